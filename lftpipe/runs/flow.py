"""The module that a run trained, and the teacher as healing changed it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lftpipe.base.errors import RunError
from lftpipe.base.shape import Part
from lftpipe.flow.part import PartSequence, build_part
from lftpipe.runs.run import OF_TEACHER, WEIGHTS, Run, load_weights
from lftpipe.teacher.checkpoint import Overlay
from lftpipe.teacher.layers import empty_layer, fill_buffers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import load_bridges


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


def build_flow(teacher: Teacher, parts: Sequence[Part]) -> nn.Module:
    """The module that a shape describes, without weights."""
    with torch.device("meta"):
        modules = [
            build_part(part, teacher.width, lambda part=part: empty_layer(teacher, part.start))
            for part in parts
        ]
    return sequence_of(teacher, [part.block for part in parts], modules)


def sequence_of(teacher: Teacher, blocks: Sequence[tuple[int, int]], modules: Sequence[nn.Module]) -> Any:
    """The modules of a student's parts as one, with the teacher's layers between them."""
    if len(modules) == 1:
        return modules[0]
    return PartSequence(modules, load_bridges(teacher, blocks, "cpu"))


def load_flow(run: Run, teacher: Teacher) -> nn.Module:
    """The trained flow layer of a run.

    Raises
    ------
    RunError
        If the file is damaged, or a tensor is missing, extra, or of another shape.
    """
    flow = build_flow(healed_teacher([run], teacher), run.parts)
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
