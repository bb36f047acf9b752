"""The module that a run trained, and the teacher as healing changed it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lftpipe.base.errors import RunError
from lftpipe.flow.linear import LinearMap
from lftpipe.flow.stack import LayerStack, NoLayer
from lftpipe.flow.velocity import Velocity
from lftpipe.runs.run import OF_TEACHER, WEIGHTS, Run, load_weights
from lftpipe.teacher.checkpoint import Overlay
from lftpipe.teacher.layers import empty_layer, fill_buffers
from lftpipe.teacher.source import Teacher


def healed_teacher(student: Sequence[Run], teacher: Teacher) -> Teacher:
    """The teacher with the tensors that healing changed; where nothing was healed, the teacher as it is."""
    changed = {
        name.removeprefix(OF_TEACHER): value
        for run in student
        if run.healed is not None
        for name, value in load_weights(run).items()
        if name.startswith(OF_TEACHER)
    }
    return replace(teacher, checkpoint=Overlay(teacher.checkpoint, changed)) if changed else teacher


def build_flow(teacher: Teacher, velocity: dict[str, Any], index: int = 0) -> nn.Module:
    """The module that a manifest's `velocity` describes, without weights.

    Parameters
    ----------
    index
        The teacher's layer that it was made from: the block's first.
    """
    if velocity.get("linear"):
        return LinearMap(teacher.width)
    if velocity.get("skip"):
        return NoLayer()
    with torch.device("meta"):
        if is_stack(velocity):
            layers = [empty_layer(teacher, index) for _ in range(velocity["depth"])]
            return LayerStack(layers, velocity["loops"])
        return Velocity(empty_layer(teacher, index), teacher.width, **velocity)


def is_stack(velocity: dict[str, Any]) -> bool:
    """Whether a manifest's `velocity` describes ordinary layers in place of a flow."""
    return "depth" in velocity


def load_flow(run: Run, teacher: Teacher) -> nn.Module:
    """The trained flow layer of a run.

    Raises
    ------
    RunError
        If the file is damaged, or a tensor is missing, extra, or of another shape.
    """
    flow = build_flow(teacher, run.velocity, run.block[0])
    weights = load_weights(run)
    tensors = {name: value for name, value in weights.items() if not name.startswith(OF_TEACHER)}
    try:
        flow.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RunError(
            f"{run.path / WEIGHTS}: {reason}", "the flow layer's tensors", "train the run again"
        ) from error
    fill_buffers(teacher, flow)
    return flow.eval().requires_grad_(False)
