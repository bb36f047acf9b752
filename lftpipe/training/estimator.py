"""The parts of a student that a run trains, with the weights that they start from."""

from itertools import pairwise

import torch

from lftpipe.base.errors import SettingsError
from lftpipe.base.shape import Part
from lftpipe.config.loss import TIMELESS
from lftpipe.config.settings import TrainSettings, depth_of, width_of
from lftpipe.families.branches import Branches
from lftpipe.flow.part import LayerStack, NoLayer, build_part
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.layers import empty_layer, load_layer
from lftpipe.teacher.source import Teacher


def part_of(settings: TrainSettings, teacher: Teacher, block: tuple[int, int], number: int) -> Part:
    """What settings put in the place of a block."""
    loops = settings.walk_steps if settings.objective == "looped" else 1
    depth, width = depth_of(settings, number), width_of(settings, number)
    if depth == 0:
        return Part(*block, "skip")
    depth = depth or 1
    if settings.objective in TIMELESS:
        return Part(*block, "layers" if depth * loops > 1 else "layer", depth=depth, loops=loops, width=width)
    return Part(
        *block,
        shift=Velocity.shifts(empty_layer(teacher, block[0])),
        source=settings.condition == "source",
        step=settings.condition == "step",
        width=width,
    )


def build_estimator(part: Part, settings: TrainSettings, teacher: Teacher) -> Velocity | LayerStack | NoLayer:
    """The module of a part, each layer with the weights of a teacher's layer or the mean of several.

    A narrow layer is without values until `lftpipe.training.starts` chooses its channels.

    Raises `SettingsError` if layers of the block have other tensors than its first.
    """
    starts = iter(parts(part.block, part.depth))
    built = build_part(part, teacher.width, lambda: _start(settings, teacher, part, next(starts)))
    assert isinstance(built, Velocity | LayerStack | NoLayer)
    return built


def parts(block: tuple[int, int], depth: int) -> list[tuple[int, int]]:
    """The block's layers divided among the layers that stand for them, as evenly as can be."""
    m, n = block
    ends = [m + round(index * (n - m) / depth) for index in range(depth + 1)]
    return list(pairwise(ends))


def _start(settings: TrainSettings, teacher: Teacher, part: Part, replaced: tuple[int, int]) -> Branches:
    """A layer of the kind of the part's first, with the weights of the first it replaces, or their mean.

    A student calls all layers of a part alike, and in some families they differ: by a window, say.
    """
    layer = load_layer(teacher, part.start)
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    wanted = range(*replaced) if settings.init == "mean" else replaced[:1]
    starts = [layer if index == part.start else load_layer(teacher, index) for index in wanted]
    for start in starts:
        if {name: value.shape for name, value in start.state_dict().items()} != shapes:
            raise SettingsError(
                f"a layer like {part.start} of {teacher.name} that starts from layer {start.index}",
                "layers with the same tensors",
                "use --depth 1 and no --init mean, or choose another block",
            )
    states = [start.state_dict() for start in starts]
    layer.load_state_dict({name: torch.stack([each[name] for each in states]).mean(0) for name in shapes})
    return layer
