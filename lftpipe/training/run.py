"""A run while it is trained: its parts, settings, stages and step, and whether it diverged."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.device import autocast, resolve_compute_dtype
from lftpipe.base.errors import RunError
from lftpipe.base.shape import Part, shape_text
from lftpipe.base.version import __version__
from lftpipe.config.loss import CLOSED_FORM, ON_LOGITS, ON_STORED_LOGITS, Stage, parse_loss, stage_starts
from lftpipe.config.settings import HealSettings, TrainSettings, loss_text
from lftpipe.data.batches import BatchFields, BatchOrder, BatchReader
from lftpipe.data.teacher_reader import reader_of
from lftpipe.flow.objective import ErrorScale
from lftpipe.flow.part import LayerStack, NoLayer
from lftpipe.flow.velocity import Velocity
from lftpipe.results.outcomes import TrainedRun
from lftpipe.storage import url_of
from lftpipe.store import Store
from lftpipe.teacher.layers import load_norm
from lftpipe.teacher.source import Teacher, record_of
from lftpipe.teacher.tail import Tail
from lftpipe.training import distributed
from lftpipe.training.estimator import build_estimator, part_of
from lftpipe.training.optimizer import (
    Optimizer,
    WeightAverage,
    copy_of,
    muon_dtype,
    peak_rate,
    rate_fraction,
    set_weights,
)
from lftpipe.training.rolling import window_of
from lftpipe.training.terms import FrozenTails, check_head

# --- Losses and gradients that are not finite are noticed, though not every step waits for the device.

#: Steps between looks, by the kind of device; a processor has nothing to wait for.
LOOK_EVERY = {"cpu": 1}
OTHERWISE = 20


def look_every(device: torch.device) -> int:
    """Steps after which a loss or gradient that is not finite is noticed at the latest."""
    return LOOK_EVERY.get(device.type, OTHERWISE)


class DivergenceState(NamedTuple):
    """What a look found."""

    loss: float
    """That of the last step, or of the first one that was not finite."""
    norm: float
    """The same of the gradient."""
    diverged_at: int | None
    """The first step whose loss or gradient was not finite."""


class DivergenceWatch:
    """Follows a run's losses and gradient norms where they are computed.

    `add` takes no look at the numbers, so nothing is waited for. What was computed with a loss that is not
    finite must not be kept: look before weights are written or judged.
    """

    def __init__(self, device: torch.device) -> None:
        # Step, loss and norm of the first bad step, of the last one while all are good; whether one was bad.
        self._state = torch.zeros(4, device=device)

    @torch.no_grad()
    def add(self, step: int, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        """Take note of a step.

        `loss`, `norm`: its loss and the norm of its gradient, on the device.
        """
        loss, norm = loss.float(), norm.float()
        bad = ~(loss.isfinite() & norm.isfinite())
        entry = torch.stack([torch.full_like(loss, step), loss, norm, bad.float()])
        # Chosen on the device: an `if` would have to wait for the loss.
        self._state = torch.where(self._state[3] > 0, self._state, entry)

    def look(self) -> DivergenceState:
        """What was noted so far; waits for the device."""
        step, loss, norm, bad = self._state.tolist()
        return DivergenceState(loss, norm, int(step) if bad else None)


# --- A run in progress: the module that learns, its optimiser and loss, how far it is, and what it ends with.

# --- What a finished run says of itself, apart from its weights.


def manifest_of(settings: TrainSettings, store: Store, parts: Sequence[Part]) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises `LftpipeError` if the store is no longer the one that the run was begun on.
    """
    now = Store.open(store.path)
    if now.fingerprint != store.fingerprint and now.origin != store.origin:
        raise RunError(
            f"{store.path}, which was made again while a run was trained on it",
            "the store that the run was begun on",
            "train the run again with --force",
        )
    timed = any(part.kind == "flow" for part in parts)
    return {
        "store_fingerprint": store.fingerprint,
        "store_origin": store.origin,
        # As it was typed: a pushed run is not to tell where somebody's home is.
        "store": url_of(store.shards.where) or str(store.path),
        "teacher": record_of(store.identity),
        "block": [parts[0].start, parts[-1].stop],
        "parts": [part.to_json() for part in parts],
        "shape": shape_text(parts, store.identity["teacher"]["layers"]),
        "objective": settings.objective,
        "loss": None if settings.objective in CLOSED_FORM else loss_text(settings),
        "solver": settings.solver if timed else "euler",
        "walk_steps": settings.walk_steps if timed else 1,
        "seed": settings.seed,
        "optimizer": settings.optimizer,
        "compute_dtype": settings.compute_dtype,
        "versions": {"lftpipe": __version__, "torch": torch.__version__},
    }


# --- One run in progress: its flow layer, its loss, and what it writes at its end.


S = TypeVar("S", bound=TrainSettings | HealSettings)


class ModuleTraining(ABC, Generic[S]):
    """A module between its first step and its last: what of it learns, by which loss, and how far it is.

    `module`: what learns are those of its weights that take gradients.
    `stages`: of the loss.
    `window`: sequences that are shuffled among themselves; 0: all.
    `block`: the layers that it runs in place of the teacher's.
    `tail`: what next-token distributions are compared through, if any are.
    `loss`: over all processes, of the last step after which one looked.
    """

    predicts_states: ClassVar[bool] = True
    """Whether what it makes of `h[m]` is to be the teacher's `h[n]`."""
    starts_trained: ClassVar[bool] = False
    """Whether its weights before the first step may be the best."""
    sequences_held_back: ClassVar[int] = 32
    """That an evaluation looks at, at most."""

    block: tuple[int, int]
    tail: Tail | None

    def __init__(
        self,
        folder: Path,
        settings: S,
        reader: BatchReader,
        teacher: Teacher,
        module: nn.Module,
        optimizer: Optimizer,
        stages: tuple[Stage, ...],
        window: int = 0,
    ) -> None:
        self.folder, self.settings, self.teacher = folder, settings, teacher
        self.reader, self.store = reader, reader.store
        self.device = torch.device(settings.device)
        self.compute_dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
        self.order = order_of(settings, self.store, window)
        self.reader.say = progress.say
        self.tokens_per_step = self.order.batch_size * self.store.context
        self.num_steps = math.ceil(settings.tokens / self.tokens_per_step)
        self.stages, self.stage_starts = stages, stage_starts(stages, self.num_steps)
        self.module, self.optimizer = module, optimizer
        self.weights = WeightAverage(module, settings.ema)
        self.watch = DivergenceWatch(self.device)
        self.step, self.loss, self.seconds, self.waited = 0, math.nan, 0.0, 0.0

    @property
    @abstractmethod
    def fields(self) -> BatchFields:
        """What the present stage looks at."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What the run can't go on with another value of, JSON-plain."""

    @abstractmethod
    def finish(self) -> TrainedRun:
        """Write weights and manifest; what to tell of the run."""

    def frozen_tail(self, tails: FrozenTails, start: int) -> Tail:
        """From `h[start]` to the logits, for terms on next-token distributions."""
        tail = tails.get(self.teacher, start, self.compute_dtype, self.device)
        if any("sampled-logits" in stage.weights for stage in self.stages):
            check_head(tail, self.teacher)
        return tail

    @property
    def finished(self) -> bool:
        """Whether the run has taken all of its steps."""
        return self.step >= self.num_steps

    @property
    def stage(self) -> Stage:
        """What the next step minimises."""
        return self.stages[self._stage_number(self.step)]

    def _stage_number(self, step: int) -> int:
        return max(
            i for i, start in enumerate(self.stage_starts[:-1]) if start <= min(step, self.num_steps - 1)
        )

    @property
    def stage_end(self) -> int:
        """The step at which the present stage ends."""
        return self.stage_starts[self._stage_number(self.step) + 1]

    def rate_fraction(self, step: int) -> float:
        """Which fraction of the peak learning rate a step has.

        A linear warm-up, then a cosine to a hundredth, over all stages.
        """
        return rate_fraction(step, self.num_steps, self.settings.warmup)

    def autocast(self) -> torch.autocast:
        """Within it, products are computed in the run's format."""
        return autocast(self.device, self.compute_dtype)

    def advance(self) -> None:
        """Take note of a step that was done."""
        self.step += 1
        self.weights.follow(self.step)
        if self.step in self.stage_starts[1:-1]:
            self.weights.forget_best()

    def judge(self, held_back_loss: float) -> None:
        """Take note of an evaluation; end the run where the last stage has had no better one for long."""
        since_best = self.weights.judge(held_back_loss)
        in_last_stage = self.stage_end == self.num_steps
        if self.settings.patience and since_best >= self.settings.patience and in_last_stage:
            self.num_steps = self.step

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "weights": copy_of(self.module),
            "optimizer": self.optimizer.state(),
            "kept": self.weights.state(),
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        set_weights(self.module, state["weights"])
        self.optimizer.restore(state["optimizer"])
        self.weights.restore(state["kept"])
        for name in ("step", "num_steps", "seconds", "waited"):
            setattr(self, name, state[name])
        if distributed.rank() == 0:
            runs.drop_metrics_after(self.folder, self.step)

    def figures(self) -> dict[str, Any]:
        """How it went, as outcomes say it."""
        return {
            "steps": self.step,
            "train_tokens": self.step * self.tokens_per_step,
            "loss": self.loss,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.step * self.tokens_per_step / max(self.seconds, 1e-9), 1),
            "data_wait_share": round(self.waited / max(self.seconds, 1e-9), 4),
        }


@dataclass(frozen=True)
class TrainedPart:
    """One part of the student in training."""

    part: Part
    flow: Velocity | LayerStack | NoLayer
    scale: ErrorScale
    """Of the errors at its end."""


class TrainingRun(ModuleTraining[TrainSettings]):
    """The training of a student of one part or of several.

    `blocks`: what the parts of its student replace, in order.
    `tails`, `reader`: shared by the runs of one command; left out, its own.
    `parts`: the parts of the student, each with its module; `flow` is all of them in a row.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        store: Store,
        teacher: Teacher,
        blocks: Sequence[tuple[int, int]],
        tails: FrozenTails | None = None,
        reader: BatchReader | None = None,
    ) -> None:
        self.m, self.n = self.block = blocks[0][0], blocks[-1][1]
        shape = [part_of(settings, teacher, block, number) for number, block in enumerate(blocks)]
        modules = [build_estimator(part, settings, teacher) for part in shape]
        self.flow = runs.sequence_of(teacher, blocks, modules).to(settings.device)
        self.flow.eval().requires_grad_(True)  # a teacher's dropout is not for us
        muon = getattr(torch, muon_dtype(settings)) if settings.optimizer == "muon" else None
        super().__init__(
            folder,
            settings,
            reader or reader_of(store, teacher, settings.device, live=settings.from_teacher),
            teacher,
            self.flow,
            Optimizer(self.flow, peak_rate(settings, None), settings.weight_decay, muon),
            parse_loss(loss_text(settings)),
            window_of(settings, store),
        )
        self.parts = [
            TrainedPart(part, module, self._scale(part.stop))
            for part, module in zip(shape, modules, strict=True)
        ]
        through_logits = any(ON_LOGITS & stage.weights.keys() for stage in self.stages)
        self.tail = self.frozen_tail(tails or FrozenTails(), self.n) if through_logits else None

    @property
    def narrow(self) -> list[TrainedPart]:
        """The parts whose layers have fewer channels than the teacher's."""
        return [one for one in self.parts if one.part.width < 1]

    @property
    def was_local(self) -> bool:
        """Whether its parts learned alone until this step, and run one after the other from here on."""
        number = self._stage_number(self.step)
        before = self.stages[number - 1].weights.keys() if number else set()
        return self.step == self.stage_starts[number] and before == {"local"} and len(self.parts) > 1

    def _scale(self, n: int) -> ErrorScale:
        """What errors of `h[n]` are measured against."""
        kind = self.settings.loss_scale
        norm = load_norm(self.teacher, n).to(self.device) if kind == "norm" else None
        return ErrorScale(kind, self._variance(n) if kind == "channel" else None, norm, distributed.mean)

    def _variance(self, n: int) -> Tensor:
        """Of the channels of `h[n]` over the first sequences."""
        count = min(64, self.order.num_sequences)
        states = self.reader.read("train", range(count), BatchFields((n,))).states[n]
        return states.flatten(0, 1).var(0)

    @property
    @override
    def fields(self) -> BatchFields:
        terms, blocks = self.stage.weights, [each.part.block for each in self.parts]
        layers = {self.m, self.n}
        if terms.keys() - ON_LOGITS:  # where each part starts, and what it is compared with
            layers |= {state for block in blocks for state in block}
        inside = {layer for block in blocks for layer in range(*block)}
        if "trajectory" in terms:
            layers |= inside
        last = self.teacher.num_layers
        if "logits" in terms and (self.settings.from_teacher or last in self.store.layers):
            layers.add(last)  # the teacher's logits are but a head away from there
        attention = tuple(sorted(inside)) if "branches" in terms else ()
        return BatchFields(tuple(sorted(layers)), attention, bool(ON_STORED_LOGITS & terms.keys()))

    @override
    def identity(self) -> list[Any]:
        used = self.settings
        named = (used.objective, used.loss, used.seed, used.batch_tokens, used.optimizer, used.condition)
        return [*map(str, named), [one.part.to_json() for one in self.parts], self.store.origin]

    @override
    def finish(self) -> TrainedRun:
        self.weights.settle()
        manifest = manifest_of(self.settings, self.store, [each.part for each in self.parts])
        manifest["train_tokens"] = self.step * self.tokens_per_step
        if distributed.rank() == 0:
            runs.save_run(self.folder, self.flow, manifest)
        return TrainedRun(
            run=str(self.folder),
            block=list(self.block),
            shape=manifest["shape"],
            objective=self.settings.objective,
            **self.figures(),
        )


def order_of(settings: TrainSettings | HealSettings, store: Store, window: int = 0) -> BatchOrder:
    """Which sequences a run sees, in which order.

    Raises `RunError` if processes can't share a batch, or all sequences are held back.
    """
    total = store.num_sequences("train")
    held_back = math.ceil(settings.hold_back * total)
    batch_size = max(1, settings.batch_tokens // store.context)
    if batch_size % distributed.count():
        raise RunError(
            f"a batch of {batch_size} sequences for {distributed.count()} processes",
            "a multiple of their number",
            "choose another --batch-tokens",
        )
    if held_back >= total:
        raise RunError(f"--hold-back {settings.hold_back:g} of {total} sequences", "some left", "lower it")
    return BatchOrder(
        batch_size=batch_size,
        seed=settings.seed,
        num_sequences=total - held_back,
        part=slice(distributed.rank(), None, distributed.count()),
        window=window,
    )
