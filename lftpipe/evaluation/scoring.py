"""Students scored over the whole validation split of a store, from its cached states, or over another text.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lftpipe.base import progress
from lftpipe.base.device import autocast, cast_linear, resolve_compute_dtype, synchronize
from lftpipe.base.errors import TeacherError
from lftpipe.base.shape import num_layers_of, shape_text
from lftpipe.config.settings import ComputeDtype
from lftpipe.data.batches import Batch, BatchFields
from lftpipe.data.teacher_reader import reader_of, states_at_hand
from lftpipe.evaluation.metrics import LogitMetrics, NextTokens, Reference, StateMetrics
from lftpipe.evaluation.predictors import Predictor
from lftpipe.evaluation.statistics import (
    Difference,
    Interval,
    Stratum,
    difference,
    holm,
    interval_of,
    resampled,
)
from lftpipe.results.scores import AdaptiveScore, Comparison, Score
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail

#: Logits that are compared at a time: 16 MiB stay in the processor's cache from one pass to the next.
PIECE_LOGITS = 2**22
#: But positions enough that the head's weights are not read for few.
LEAST_POSITIONS = 128


@runtime_checkable
class Validation(Protocol):
    """Text that predictors are scored on, with the teacher's states."""

    states: tuple[int, ...]
    """Those that batches can have."""
    num_tokens: int
    words: int | None
    """Of a text that is scored as a whole: every token of it is then a target once."""

    def batches(self, fields: BatchFields) -> Iterator[Batch]:
        """All of it, once, in the same order every time."""
        ...


class ValidationSplit:
    """The whole validation split of a store."""

    words: int | None = None

    def __init__(self, store: Store, teacher: Teacher, device: str, batch_tokens: int) -> None:
        self.states = states_at_hand(store, teacher)
        self.num_tokens = store.num_sequences("validation") * store.context
        self._reader = reader_of(store, teacher, device, live=not store.layers)
        self._size = max(1, batch_tokens // store.context)

    def batches(self, fields: BatchFields) -> Iterator[Batch]:
        """Batches of its sequences."""
        total = self._reader.store.num_sequences("validation")
        for number, start in enumerate(range(0, total, self._size)):
            part = range(start, min(start + self._size, total))
            yield self._reader.read("validation", part, fields, number)


@dataclass
class Measured:
    """What one predictor reaches: sums over batches, and its fastest batch."""

    predictor: Predictor
    state: StateMetrics = field(default_factory=StateMetrics)
    logits: LogitMetrics = field(default_factory=LogitMetrics)
    ms_per_token: float = math.inf

    def score(self, teacher: LogitMetrics, words: int | None, num_layers: int) -> Score:
        """As a line of the table, beside the teacher's figures; what is not finite has no number."""
        predictor, steps, origin = self.predictor, self.predictor.steps, self.predictor.origin
        given: dict[str, Any] = {
            "method": predictor.method,
            "block": predictor.block_text,
            "solver": steps.solver if steps else None,
            "k": steps.k if steps else None,
            "nfe": steps.nfe if steps else None if predictor.block is None else 0,
            "shape": shape_text(predictor.shape, num_layers) if predictor.shape else None,
            "layers": num_layers_of(predictor.shape, num_layers),
            "parameters": predictor.parameters,
            "bytes": 4 * predictor.parameters,
            "ms_per_token": _finite(self.ms_per_token),
            "ppl": _finite(self.logits.perplexity),
            "word_ppl": None if words is None else _finite(self.logits.perplexity_per(words)),
        }
        given |= asdict(origin) if origin else {}
        kl, positions, nats, targets = self.logits.by_document()
        given["ppl_interval"] = _exp_interval((nats, targets))
        if predictor.block is not None:
            excess = nats - teacher.by_document()[2]
            given |= {
                "kl": _finite(self.logits.kl),
                "kl_interval": interval_of(resampled([(kl, positions)])),
                "agreement": self.logits.agreement,
                "ppl_ratio": _finite(self.logits.perplexity / teacher.perplexity),
                "ppl_ratio_interval": _exp_interval((excess, targets)),
            }
            if self.state.num_tokens:
                kinds = ("kl_latent", "nmse", "nmse_without_first")
                given |= {kind: _finite(getattr(self.state, kind)) for kind in kinds}
        if steps is None or (chosen := steps.chosen) is None:
            return Score(**given)
        given |= {"nfe": chosen.mean, "nfe_with_keys": chosen.mean_with_keys(steps.k)}
        return AdaptiveScore(**given, threshold=chosen.threshold)


def _exp_interval(nats: Stratum) -> Interval | None:
    figures = resampled([nats])
    with np.errstate(over="ignore"):
        return interval_of(None if figures is None else np.exp(figures))


@dataclass(frozen=True)
class Scored:
    """What all predictors reach on the same text."""

    measured: list[Measured]
    teacher: LogitMetrics
    words: int | None
    num_layers: int
    """The teacher's."""

    @property
    def rows(self) -> list[Score]:
        """A line for each."""
        return [one.score(self.teacher, self.words, self.num_layers) for one in self.measured]

    @property
    def num_documents(self) -> int:
        """Documents, or windows of a text that is one: what intervals draw."""
        return self.teacher.num_documents

    def comparisons(self) -> list[Comparison]:
        """The student of the lowest KL against the best of every other run, on the same documents."""
        best: dict[str, Measured] = {}
        for one in sorted(self.measured, key=lambda one: one.logits.kl):
            if one.predictor.origin and not one.predictor.adaptive:
                best.setdefault(one.predictor.origin.run, one)
        finite = [each for each in best.items() if math.isfinite(each[1].logits.kl)]
        if not finite:
            return []
        (name, first), *others = finite
        kl, positions, *_ = first.logits.by_document()
        found = {other: difference([(kl - one.logits.by_document()[0], positions)]) for other, one in others}
        return compared_with("kl", name, found)


def compared_with(measure: str, run: str, found: Mapping[str, Difference]) -> list[Comparison]:
    """A run against others, by their names, with Holm's correction for all of them."""
    adjusted = holm([each.p for each in found.values()])
    return [
        Comparison(
            measure=measure,
            run=run,
            against=against,
            difference=each.value,
            interval=each.interval,
            p=each.p,
            p_holm=corrected,
        )
        for (against, each), corrected in zip(found.items(), adjusted, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.inference_mode()
def score(
    predictors: list[Predictor],
    validation: Validation,
    teacher: Teacher,
    *,
    compute_dtype: ComputeDtype,
    device: str,
    timed_batches: int = 0,
) -> Scored:
    """What every predictor reaches over the whole of a text.

    `predictors`: compared with the teacher's logits, which are computed once for each block's end.
    Raises `TeacherError` if the teacher's own logits are not finite.
    """
    stored = validation.states
    start = min((one.block[0] for one in predictors if one.block), default=max(stored))
    dtype = resolve_compute_dtype(compute_dtype, device)
    tail = Tail(teacher, start).to(device)
    cast_linear(tail, dtype)
    for one in predictors:
        if one.tail is not None:
            cast_linear(one.tail, dtype)
    measured = [Measured(one) for one in predictors]
    of_teacher = LogitMetrics()
    compared = [of_teacher, *(one.logits for one in measured)]
    ends = {_end(one, stored) for one in predictors} | {max(stored)}
    starts = {one.block[0] for one in predictors if one.block}
    if any(one.enter for one in predictors) and 0 in stored:
        starts.add(0)
    fields = BatchFields(tuple(sorted({start} | starts | ends)))
    total = validation.num_tokens * len(predictors)
    with autocast(device, dtype), progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for batch in validation.batches(fields):
            for n in sorted(ends):
                here = [one for one in measured if _end(one.predictor, stored) == n]
                totals = [of_teacher] if n == max(ends) else []
                for advanced in _compare(here, totals, tail, batch, n):
                    task.advance(advanced)
            if batch.step < timed_batches:
                _time(measured, tail, batch, start)
            if batch.step == 0:  # not in every batch: to look is to wait for a GPU
                _refuse_nan(compared, teacher)
    _refuse_nan(compared, teacher)
    return Scored(measured, of_teacher, validation.words, teacher.num_layers)


def _compare(
    measured: list[Measured], totals: list[LogitMetrics], tail: Tail, batch: Batch, n: int
) -> Iterator[int]:
    """Add what predictors make of a batch to their sums, and the teacher to its `totals`.

    Logits are compared piece by piece of the positions: those of a whole batch would fill the memory, and
    leave the processor's cache between one pass over them and the next.
    """
    true = tail.states(batch.states[n], batch.context, start=n).flatten(0, 1)
    following = NextTokens.of(batch.tokens, batch.first_of_segment, batch.document)
    lasts = [_last(one, tail, batch, n) for one in measured]
    size = max(LEAST_POSITIONS, PIECE_LOGITS // tail.vocabulary)
    for first in range(0, len(true), size):
        rows = slice(first, first + size)
        reference, targets = Reference.of(tail.logits(true[rows])), following.part(rows)
        for each in totals:
            each.add(reference.logits, reference, targets)
        for one, last in zip(measured, lasts, strict=True):
            own = one.predictor.tail or tail
            one.logits.add(reference.logits if last is None else own.logits(last[rows]), reference, targets)
        yield len(targets.ids) * len(measured)


def _refuse_nan(compared: Sequence[LogitMetrics], teacher: Teacher) -> None:
    if not all(each.of_finite_teacher for each in compared):
        raise TeacherError(
            f"teacher {teacher.name}, whose logits are not finite",
            "finite weights and states",
            "check the teacher's weights, then extract again",
        )


def _end(predictor: Predictor, stored: tuple[int, ...]) -> int:
    """The state at hand whose logits are compared with: the block's end if it is stored, else the last."""
    block = predictor.block
    return block[1] if block and block[1] in stored else max(stored)


def _last(one: Measured, tail: Tail, batch: Batch, n: int) -> Tensor | None:
    """A predictor's last states, flat, and their metrics added; the teacher's own are at hand."""
    block = one.predictor.block
    if block is None:
        return None
    enter, own = one.predictor.enter, one.predictor.tail or tail
    x_0 = batch.states[block[0]] if enter is None else enter(batch)
    predicted = one.predictor.predict(x_0, batch.context).float()
    if block[1] == n:
        one.state.add(predicted, batch.states[n], batch.first_of_segment)
    return own.states(predicted, batch.context, start=block[1]).flatten(0, 1)


def _time(measured: list[Measured], tail: Tail, batch: Batch, start: int) -> None:
    """Time every predictor over the same stretch, from `h[start]` to the logits; the fastest batch counts."""
    for one in measured:
        if one.predictor.adaptive:  # its batches are evaluated whole: a clock would say nothing
            continue
        x = batch.states[start]
        synchronize(x.device)  # what was computed before is not its time
        began = time.perf_counter()
        m, n = one.predictor.block or (start, start)
        x = tail.states(x, batch.context, start=start, stop=m)
        own = one.predictor.tail or tail
        own(one.predictor.predict(x, batch.context), batch.context, start=n)
        synchronize(x.device)
        milliseconds = 1000 * (time.perf_counter() - began) / batch.tokens.numel()
        one.ms_per_token = min(one.ms_per_token, milliseconds)
