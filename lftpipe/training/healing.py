"""Healing: the training of a whole student, from its flow layers and the teacher's own layers after them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.version import __version__
from lftpipe.config.loss import ON_STORED_LOGITS, parse_loss
from lftpipe.config.settings import HealSettings
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.families.attention import AttentionContext
from lftpipe.families.layer_probe import is_linear_map, is_transposed
from lftpipe.flow.part import PartSequence, carry
from lftpipe.flow.path import States
from lftpipe.results.outcomes import TrainedRun
from lftpipe.runs import Run
from lftpipe.store import Store
from lftpipe.teacher.layers import load_embedding, load_layer, load_norm
from lftpipe.teacher.source import Teacher
from lftpipe.training import distributed
from lftpipe.training.optimizer import Optimizer, trained_weights
from lftpipe.training.run import ModuleTraining
from lftpipe.training.terms import FrozenTails, LogitsProblem

#: Settings that a healed run's manifest has.
RECORDED = ("train", "adapter", "loss", "learning_rate", "seed")


@dataclass(frozen=True)
class Healed:
    """Tensors of a healed student, adapters merged."""

    flow: dict[str, Tensor]
    """By their names in the module of its parts."""
    teacher: dict[str, Tensor]
    """Of the layers before, between and after the parts; by their names in the teacher's checkpoint."""


class HealingStudent(nn.Module):
    """From the first part's `h[m]`, or from `h[0]`, to the states that the head reads.

    Embedding and head stay the teacher's and are no part of it.

    `run`: what is healed; healed before, it goes on from there.
    `whole`: whether the layers before the first part are trained too.
    """

    def __init__(self, run: Run, teacher: Teacher, *, whole: bool) -> None:
        super().__init__()
        self.run, self.teacher = run, runs.healed_teacher([run], teacher)
        last, m = teacher.num_layers, run.block[0]
        self.first = 0 if whole else m
        self.before = self._layers(self.first, m)
        flow = runs.load_flow(run, teacher)
        self.flows = flow.parts if isinstance(flow, PartSequence) else nn.ModuleList([flow])
        stops = [*(part.start for part in run.parts[1:]), last]
        self.after = nn.ModuleList(
            self._layers(part.stop, stop) for part, stop in zip(run.parts, stops, strict=True)
        )
        self.norm = load_norm(self.teacher, last)
        self.eval().requires_grad_(True)  # a teacher's dropout is not for us

    def _layers(self, start: int, stop: int) -> nn.ModuleList:
        return nn.ModuleList(load_layer(self.teacher, index) for index in range(start, stop))

    def adapt(self, rank: int) -> None:
        """Freeze everything, and add LoRA to every linear map that is no modulation by time (by `peft`).

        `rank`: of each adapter; updates are scaled by 2, as `lora_alpha = 2 * rank` does.
        Raises `SettingsError` if peft is not installed, or there is no linear map.
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
        for flow, after in zip(self.flows, self.after, strict=True):
            x = carry(flow, x, context, self.run.solver, self.run.walk_steps)
            for layer in cast(nn.ModuleList, after):
                x = layer(x, context)
        return self.norm(x)

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
        found = Healed({}, {})
        for name, value in state.items():
            if ".base_layer." not in name and ".lora_" not in name:
                of_flow, own = self._place(name)
                (found.flow if of_flow else found.teacher)[own] = value.clone()
        return found

    def _place(self, name: str) -> tuple[bool, str]:
        """Whether a tensor of this module is of a part, and its name there or in the teacher's checkpoint."""
        family, parts = self.teacher.family, self.run.parts
        place, _, rest = name.partition(".")
        if place == "norm":
            return False, f"{family.final_norm_prefix}.{rest}"
        start = self.first
        if place != "before":
            index, _, rest = rest.partition(".")
            start = parts[int(index)].stop
            if place == "flows":
                return True, rest if len(parts) == 1 else f"parts.{index}.{rest}"
        index, _, tensor = rest.partition(".layer.")
        return False, f"{family.layers_prefix}.{start + int(index)}.{tensor}"


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
    """The training of a whole student, from a finished run to a new one.

    Raises `RunError` if nothing of the student learns.
    """

    predicts_states = False
    starts_trained = True
    sequences_held_back = 64

    def __init__(
        self, folder: Path, settings: HealSettings, source: Run, store: Store, teacher: Teacher
    ) -> None:
        self.source = source
        self.student = student = _student_of(source, settings, teacher)
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
        named = (used.train, used.adapter, used.rank, used.loss, used.seed, used.batch_tokens)
        return [self.source.weights_digest, *map(str, named), self.store.origin]

    @override
    def finish(self) -> TrainedRun:
        self.weights.settle()
        manifest = _manifest(self.source, self.settings, self.step * self.tokens_per_step)
        if distributed.rank() == 0:
            merged = self.student.merged()
            runs.save_run(self.folder, merged.flow, manifest, merged.teacher)
        return TrainedRun(
            run=str(self.folder),
            block=list(self.source.block),
            shape=self.source.shape,
            objective=self.source.objective,
            **self.figures(),
        )


def _student_of(source: Run, settings: HealSettings, teacher: Teacher) -> HealingStudent:
    torch.manual_seed(settings.seed)
    student = HealingStudent(source, teacher, whole=settings.train == "student")
    if settings.adapter == "lora":
        student.adapt(settings.rank)
    if not trained_weights(student):
        raise RunError(f"{source.path} with --train {settings.train}", "a layer to train", "use student")
    return student.to(settings.device)


def _manifest(source: Run, settings: HealSettings, tokens: int) -> dict[str, Any]:
    """That of the run that was healed, and what healing did."""
    manifest = json.loads((source.path / runs.MANIFEST).read_text())
    for key in ("weights_digest", "metrics_digest", "digest"):
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
