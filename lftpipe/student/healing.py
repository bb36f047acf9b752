"""A student as healing trains it: its flow layers with the teacher's own layers after or around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.families.attention import AttentionContext
from lftpipe.families.layer_probe import is_linear_map, is_transposed
from lftpipe.flow.path import States
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.stack import LayerStack
from lftpipe.flow.velocity import Velocity
from lftpipe.runs import Run
from lftpipe.teacher.layers import load_layer, load_norm
from lftpipe.teacher.source import Teacher


@dataclass(frozen=True)
class Healed:
    """Tensors of one run of a healed student, adapters merged."""

    flow: dict[str, Tensor]
    """By their names in the module that stands for the block."""
    teacher: dict[str, Tensor]
    """Of the layers after its block, up to the next one, and those before the first block; by their names in
    the teacher's checkpoint."""


class HealingStudent(nn.Module):
    """From the first block's `h[m]`, or from `h[0]`, to the states that the head reads.

    Embedding and head stay the teacher's and are no part of it.

    Parameters
    ----------
    student
        What is healed, all its runs in the order of their blocks; healed before, it goes on from there.
    whole
        Whether the layers before the first block are trained too.
    """

    def __init__(self, student: Sequence[Run], teacher: Teacher, *, whole: bool) -> None:
        super().__init__()
        self.runs, self.teacher = student, runs.healed_teacher(student, teacher)
        last, m = teacher.num_layers, student[0].block[0]
        self.first = 0 if whole else m
        self.before = self._layers(self.first, m)
        self.flows = nn.ModuleList(runs.load_flow(run, teacher) for run in student)
        stops = [*(run.block[0] for run in student[1:]), last]
        self.after = nn.ModuleList(
            self._layers(run.block[1], stop) for run, stop in zip(student, stops, strict=True)
        )
        self.norm = load_norm(self.teacher, last)
        self.eval().requires_grad_(True)  # a teacher's dropout is not for us

    def _layers(self, start: int, stop: int) -> nn.ModuleList:
        return nn.ModuleList(load_layer(self.teacher, index) for index in range(start, stop))

    def adapt(self, rank: int) -> None:
        """Freeze everything, and add LoRA to every linear map that is no modulation by time (by `peft`).

        Parameters
        ----------
        rank
            Of each adapter; updates are scaled by 2, as `lora_alpha = 2 * rank` does.

        Raises
        ------
        SettingsError
            If peft is not installed, or there is no linear map.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise SettingsError(
                "--adapter lora without peft", "the peft package", "pip install peft, or use --adapter full"
            ) from error
        maps = {
            name: part
            for name, part in self.named_modules()
            if is_linear_map(part) and ".modulation." not in name
        }
        if not maps:
            raise SettingsError(
                f"--adapter lora for {self.teacher.name}, whose layers have no linear maps",
                "maps to adapt",
                "use --adapter full",
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=list(maps),
            fan_in_fan_out=any(map(is_transposed, maps.values())),
        )
        inject_adapter_in_model(config, self)
        self.eval()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What gradients are for, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def forward(self, x: States, context: AttentionContext) -> States:
        """The states after the final norm."""
        for layer in self.before:
            x = layer(x, context)
        for run, flow, after in zip(self.runs, self.flows, self.after, strict=True):
            x = _cross(run, flow, x, context)
            for layer in cast(nn.ModuleList, after):
                x = layer(x, context)
        return self.norm(x)

    @torch.no_grad()
    def merged(self) -> list[Healed]:
        """All tensors as they are now, run by run; adapters are added to the maps they adapt."""
        state = self.state_dict()
        for name, part in self.named_modules():
            if hasattr(part, "get_delta_weight"):  # peft's, of a map with an adapter
                adapted: Any = part
                base = adapted.get_base_layer()
                state[f"{name}.weight"] = base.weight + adapted.get_delta_weight("default")
                if base.bias is not None:
                    state[f"{name}.bias"] = base.bias
        found = [Healed({}, {}) for _ in self.runs]
        for name, value in state.items():
            if ".base_layer." not in name and ".lora_" not in name:
                number, of_flow, own = self._place(name)
                (found[number].flow if of_flow else found[number].teacher)[own] = value.clone()
        return found

    def _place(self, name: str) -> tuple[int, bool, str]:
        """Which run has a tensor of this module, whether in its flow layer, and under which name."""
        family, last = self.teacher.family, len(self.runs) - 1
        part, _, rest = name.partition(".")
        if part == "norm":
            return last, False, f"{family.final_norm_prefix}.{rest}"
        number, start = 0, self.first
        if part != "before":
            index, _, rest = rest.partition(".")
            number = int(index)
            start = self.runs[number].block[1]
        if part == "flows":
            return number, True, rest
        index, _, tensor = rest.partition(".layer.")
        return number, False, f"{family.layers_prefix}.{start + int(index)}.{tensor}"


def _cross(run: Run, flow: nn.Module, x: States, context: AttentionContext) -> States:
    """From a block's start to its end, as at inference."""
    if isinstance(flow, LayerStack):
        return flow.run(x, repeat(context))
    if not isinstance(flow, Velocity):
        return ODESolver(lambda x, t, step_size: flow(x, t, context)).sample(x, 1.0, "euler")
    method, k = (run.solver, run.walk_steps) if run.has_time else ("euler", 1)
    return _walk(flow, x, context, method, k)


def _walk(flow: Velocity, x_0: States, context: AttentionContext, method: Method, k: int) -> States:
    def velocity(x: States, t: Tensor, step_size: Tensor) -> States:
        return flow(x, t, context, source=x_0, step_size=step_size)

    return ODESolver(velocity).sample(x_0, 1 / k, method)
