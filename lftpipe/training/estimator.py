"""The module that a run trains, with the weights that it starts from, and how a manifest describes it."""

from itertools import pairwise
from typing import Any

import torch

from lftpipe.base.errors import SettingsError
from lftpipe.config.loss import TIMELESS
from lftpipe.config.settings import TrainSettings, depth_of
from lftpipe.families.branches import Branches
from lftpipe.flow.stack import LayerStack
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.layers import load_layer
from lftpipe.teacher.source import Teacher


def build_estimator(
    settings: TrainSettings, teacher: Teacher, block: tuple[int, int]
) -> Velocity | LayerStack:
    """A velocity that starts as the block's first layer, or as the mean of its layers; or a stack of several.

    Raises
    ------
    SettingsError
        If layers of the block have other tensors than its first.
    """
    loops = settings.walk_steps if settings.objective == "looped" else 1
    layers = [_start(settings, teacher, block[0], part) for part in parts(block, depth_of(settings) or 1)]
    if len(layers) * loops > 1:
        return LayerStack(layers, loops)
    return Velocity(
        layers[0],
        teacher.width,
        time=settings.objective not in TIMELESS,
        source=settings.condition == "source",
        step=settings.condition == "step",
    )


def parts(block: tuple[int, int], depth: int) -> list[tuple[int, int]]:
    """The block's layers divided among the layers that stand for them, as evenly as can be."""
    m, n = block
    ends = [m + round(index * (n - m) / depth) for index in range(depth + 1)]
    return list(pairwise(ends))


def _start(settings: TrainSettings, teacher: Teacher, kind: int, part: tuple[int, int]) -> Branches:
    """A layer of the kind of the block's first, with the weights of the part's first, or their mean.

    A student calls all layers in a block's place alike, and in some families they differ: by a window, say.
    """
    layer = load_layer(teacher, kind)
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    wanted = range(*part) if settings.init == "mean" else part[:1]
    starts = [layer if index == kind else load_layer(teacher, index) for index in wanted]
    for start in starts:
        if {name: value.shape for name, value in start.state_dict().items()} != shapes:
            raise SettingsError(
                f"a layer like {kind} of {teacher.name} that starts from layer {start.index}",
                "layers with the same tensors",
                "use --depth 1 and no --init mean, or choose another block",
            )
    states = [start.state_dict() for start in starts]
    layer.load_state_dict({name: torch.stack([each[name] for each in states]).mean(0) for name in shapes})
    return layer


def description(flow: Velocity | LayerStack, settings: TrainSettings) -> dict[str, Any]:
    """The manifest's `velocity`, from which `lftpipe.runs.build_flow` builds the module again."""
    found: dict[str, Any] = {
        "time": flow.modulation is not None,
        "shift": flow.shift,
        "source": flow.source is not None,
        "step": settings.condition == "step",
    }
    if isinstance(flow, LayerStack):
        found |= {"depth": len(flow.layers), "loops": flow.loops}
    return found
