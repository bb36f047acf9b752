"""A student as healing trains it: the flow layer with the teacher's own layers after it, or around it."""

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe import runs
from lftpipe.errors import SettingsError
from lftpipe.flow.path import States
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.stack import LayerStack
from lftpipe.flow.velocity import Velocity
from lftpipe.runs import Run
from lftpipe.teacher.context import AttentionContext
from lftpipe.teacher.parts import load_layer, load_norm
from lftpipe.teacher.source import Teacher


@dataclass(frozen=True)
class Healed:
    """Tensors of a healed student, adapters merged."""

    flow: dict[str, Tensor]
    """By their names in the module that stands for the block."""
    teacher: dict[str, Tensor]
    """By their names in the teacher's checkpoint."""


class HealingStudent(nn.Module):
    """From `h[m]`, or from `h[0]`, to the states that the head reads.

    Embedding and head stay the teacher's and are no part of it.

    Parameters
    ----------
    run
        What is healed; healed before, it goes on from there.
    teacher
        Its teacher.
    whole
        Whether the layers before the block are trained too.
    """

    def __init__(self, run: Run, teacher: Teacher, *, whole: bool) -> None:
        super().__init__()
        self.run, self.teacher = run, runs.healed_teacher(run, teacher)
        (m, n), last = run.block, teacher.num_layers
        self.first = 0 if whole else m
        self.before = nn.ModuleList(load_layer(self.teacher, index) for index in range(self.first, m))
        self.flow = runs.load_flow(run, teacher)
        self.after = nn.ModuleList(load_layer(self.teacher, index) for index in range(n, last))
        self.norm = load_norm(self.teacher, last)
        self.eval().requires_grad_(True)  # a teacher's dropout is not for us

    def adapt(self, rank: int) -> None:
        """Freeze everything, and add LoRA to every linear map that is no modulation by time (by `peft`).

        Parameters
        ----------
        rank
            Of each adapter; updates are scaled by 2, as `lora_alpha = 2 * rank` does.

        Raises
        ------
        SettingsError
            If peft is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise SettingsError(
                "--adapter lora without peft", "the peft package", "pip install peft, or use --adapter full"
            ) from error
        maps = [
            name
            for name, part in self.named_modules()
            if isinstance(part, nn.Linear) and ".modulation." not in name
        ]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=maps)
        inject_adapter_in_model(config, self)
        self.eval()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What gradients are for, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def forward(self, x: States, context: AttentionContext) -> States:
        """The states after the final norm.

        Parameters
        ----------
        x
            `h[first]`.
        context
            Positions and mask of the sequences.
        """
        for layer in self.before:
            x = layer(x, context)
        x = self._cross(x, context)
        for layer in self.after:
            x = layer(x, context)
        return self.norm(x)

    def _cross(self, x: States, context: AttentionContext) -> States:
        """From the block's start to its end, as at inference."""
        if isinstance(self.flow, LayerStack):
            return self.flow.run(x, repeat(context))
        if not isinstance(self.flow, Velocity):
            return ODESolver(lambda x, t, step_size: self.flow(x, t, context)).sample(x, 1.0, "euler")
        flow, method, k = self.flow, self.run.solver, self.run.walk_steps
        if not self.run.has_time:
            method, k = "euler", 1
        return _walk(flow, x, context, method, k)

    @torch.no_grad()
    def merged(self) -> Healed:
        """All tensors as they are now; adapters are added to the maps they adapt."""
        state = self.state_dict()
        for name, part in self.named_modules():
            if hasattr(part, "get_delta_weight"):  # peft's, of a map with an adapter
                adapted: Any = part
                base = adapted.get_base_layer()
                state[f"{name}.weight"] = base.weight + adapted.get_delta_weight("default")
                if base.bias is not None:
                    state[f"{name}.bias"] = base.bias
        plain = {n: v for n, v in state.items() if ".base_layer." not in n and ".lora_" not in n}
        return Healed(
            flow={n.removeprefix("flow."): v.clone() for n, v in plain.items() if n.startswith("flow.")},
            teacher={name: plain[own].clone() for own, name in self._names(list(plain)).items()},
        )

    def _names(self, own: list[str]) -> dict[str, str]:
        """Names in the teacher's checkpoint, by this module's, of all that is the teacher's."""
        family, n = self.teacher.family, self.run.block[1]
        names: dict[str, str] = {}
        for name in own:
            part, _, rest = name.partition(".")
            if part == "norm":
                names[name] = f"{family.final_norm_prefix}.{rest}"
            elif part in ("before", "after"):
                index, _, tensor = rest.partition(".layer.")
                layer = int(index) + (self.first if part == "before" else n)
                names[name] = f"{family.layers_prefix}.{layer}.{tensor}"
        return names


def _walk(flow: Velocity, x_0: States, context: AttentionContext, method: Method, k: int) -> States:
    def velocity(x: States, t: Tensor, step_size: Tensor) -> States:
        return flow(x, t, context, source=x_0, step_size=step_size)

    return ODESolver(velocity).sample(x_0, 1 / k, method)
