"""Healing: the training of a whole student, from its flow layers and the teacher's own layers after them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.files import fingerprint
from lftpipe.base.version import __version__
from lftpipe.config.loss import ON_STORED_LOGITS, parse_loss
from lftpipe.config.settings import HealSettings
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.families.attention import AttentionContext
from lftpipe.families.layer_probe import is_linear_map, is_transposed
from lftpipe.flow.path import States
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.stack import LayerStack
from lftpipe.flow.velocity import Velocity
from lftpipe.results.outcomes import TrainedRun
from lftpipe.runs import Run
from lftpipe.store import Store
from lftpipe.teacher.layers import load_embedding, load_layer, load_norm
from lftpipe.teacher.source import Teacher
from lftpipe.training import distributed
from lftpipe.training.averaging import trained_weights
from lftpipe.training.optimizer import Optimizer
from lftpipe.training.run import ModuleTraining
from lftpipe.training.terms import FrozenTails, LogitsProblem

#: Settings that a healed run's manifest has.
RECORDED = ("train", "adapter", "loss", "learning_rate", "seed")


class Part(NamedTuple):
    """One flow layer of the student: where it goes, by which settings, and what it was."""

    folder: Path
    settings: HealSettings
    source: Run


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


@dataclass(frozen=True)
class HealingProblem(LogitsProblem):
    """One batch seen by a student that is healed."""

    student: HealingStudent

    @cached_property
    @override
    def end(self) -> States:
        return self.student(self.x_0, self.batch.context)

    @cached_property
    @override
    def head_input(self) -> States:
        return self.end  # its final norm is its own


class HealingRun(ModuleTraining[HealSettings]):
    """The training of a student as one module, from finished runs to as many new ones.

    Metrics and checkpoint are in the first one's folder.

    Raises
    ------
    RunError
        If nothing of the student learns.
    """

    predicts_states = False
    starts_trained = True
    sequences_held_back = 64

    def __init__(self, parts: Sequence[Part], store: Store, teacher: Teacher) -> None:
        folder, settings, _ = parts[0]
        self.parts = parts
        self.student = student = _student_of(parts, teacher)
        assert settings.learning_rate is not None
        super().__init__(
            folder,
            settings,
            BatchReader(store, teacher, settings.device),
            teacher,
            student,
            Optimizer(student, settings.learning_rate, settings.weight_decay),
            parse_loss(settings.loss),
        )
        self.block = (student.first, teacher.num_layers)
        stored = student.first in store.layers
        self._embedding = None if stored else load_embedding(teacher).to(self.device)
        # The teacher's own last layers and head; those that heal are others.
        deepest = max(store.layers) if settings.loss == "logits" else teacher.num_layers
        self.tail = self.frozen_tail(FrozenTails(), deepest)

    @property
    @override
    def fields(self) -> BatchFields:
        layers = {self.student.first} if self._embedding is None else set()
        if self.settings.loss == "logits":
            assert self.tail is not None
            layers.add(self.tail.start)
        return BatchFields(tuple(sorted(layers)), logits=self.settings.loss in ON_STORED_LOGITS)

    def pose(self, batch: Batch) -> HealingProblem:
        """A batch as the student sees it."""
        embedding = self._embedding
        x_0 = (
            batch.states[self.student.first]
            if embedding is None
            else embedding(batch.tokens, batch.position_ids)
        )
        return HealingProblem(batch, x_0, self.tail, self.student)

    @override
    def identity(self) -> list[Any]:
        used = self.settings
        digests = [part.source.weights_digest for part in self.parts]
        named = (used.train, used.adapter, used.rank, used.loss, used.seed, used.batch_tokens)
        return [digests, *map(str, named), self.store.origin]

    @override
    def finish(self) -> TrainedRun:
        self.weights.settle()
        tokens = self.step * self.tokens_per_step
        names = [part.folder.name for part in self.parts]
        if distributed.rank() == 0:
            # The first run's is the last manifest: its folder has the checkpoint that all go on from.
            for part, merged in reversed(list(zip(self.parts, self.student.merged(), strict=True))):
                manifest = _manifest(part.source, part.settings, tokens)
                if len(names) > 1:
                    manifest |= {"joint": names, "student": self._mark(manifest["healed"])}
                runs.save_run(part.folder, merged.flow, manifest, merged.teacher)
        source = self.parts[0].source
        return TrainedRun(
            run=str(self.folder),
            block=list(source.block),
            joint=[str(part.folder) for part in self.parts] if len(names) > 1 else None,
            objective=source.objective,
            **self.figures(),
        )

    def _mark(self, healed: dict[str, Any]) -> str:
        """What the manifests of all runs of this student have in common, and no other run's."""
        names = [part.folder.name for part in self.parts]
        alike = [names, [part.source.weights_digest for part in self.parts], healed["tokens"]]
        return fingerprint([*alike, *(healed[key] for key in RECORDED)])


def _student_of(parts: Sequence[Part], teacher: Teacher) -> HealingStudent:
    _, settings, first = parts[0]
    torch.manual_seed(settings.seed)
    student = HealingStudent([part.source for part in parts], teacher, whole=settings.train == "student")
    if settings.adapter == "lora":
        student.adapt(settings.rank)
    if not trained_weights(student):
        raise RunError(f"{first.path} with --train {settings.train}", "a layer to train", "use student")
    return student.to(settings.device)


def _manifest(source: Run, settings: HealSettings, tokens: int) -> dict[str, Any]:
    """That of the run that was healed, and what healing did."""
    manifest = json.loads((source.path / runs.MANIFEST).read_text())
    for key in ("weights_digest", "metrics_digest", "digest", "joint", "student"):
        manifest.pop(key, None)
    healed = {key: getattr(settings, key) for key in RECORDED}
    if settings.adapter == "lora":
        healed["rank"] = settings.rank
    healed |= {"run": str(source.path), "weights_digest": source.weights_digest, "tokens": tokens}
    if source.healed is not None:
        healed["before"] = source.healed
    return manifest | {
        "healed": healed,
        "train_tokens": source.train_tokens + tokens,
        "versions": {"lftpipe": __version__, "torch": torch.__version__},
    }
