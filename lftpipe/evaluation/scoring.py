"""Students scored over the whole validation split of a store, from its cached states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lftpipe.base import progress
from lftpipe.base.device import autocast, cast_linear, resolve_compute_dtype
from lftpipe.base.errors import TeacherError
from lftpipe.config.settings import ComputeDtype
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.data.teacher_reader import reader_of, states_at_hand
from lftpipe.evaluation.metrics import LogitMetrics, NextTokens, Reference, StateMetrics
from lftpipe.evaluation.predictors import Predictor
from lftpipe.results.scores import AdaptiveScore, Score
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail

#: Logits that are compared at a time: 16 MiB stay in the processor's cache from one pass to the next.
PIECE_LOGITS = 2**22
#: But positions enough that the head's weights are not read for few.
LEAST_POSITIONS = 128


def _batches(reader: BatchReader, fields: BatchFields, batch_tokens: int) -> Iterator[Batch]:
    """The whole validation split."""
    total, size = reader.store.num_sequences("validation"), max(1, batch_tokens // reader.store.context)
    for number, start in enumerate(range(0, total, size)):
        yield reader.read("validation", range(start, min(start + size, total)), fields, number)


@dataclass
class Measured:
    """What one predictor reaches: sums over batches, and its fastest batch."""

    predictor: Predictor
    state: StateMetrics = field(default_factory=StateMetrics)
    logits: LogitMetrics = field(default_factory=LogitMetrics)
    ms_per_token: float = math.inf

    def score(self, teacher_ppl: float | None) -> Score:
        """As a line of the table; what is not finite has no number."""
        predictor, steps, origin = self.predictor, self.predictor.steps, self.predictor.origin
        given: dict[str, Any] = {
            "method": predictor.method,
            "block": predictor.block_text,
            "solver": steps.solver if steps else None,
            "k": steps.k if steps else None,
            "nfe": steps.nfe if steps else None if predictor.block is None else 0,
            "parameters": predictor.parameters,
            "ms_per_token": _finite(self.ms_per_token),
            "ppl": _finite(self.logits.perplexity),
        }
        given |= asdict(origin) if origin else {}
        if predictor.block is not None:
            ratio = self.logits.perplexity / teacher_ppl if teacher_ppl else math.nan
            given |= {
                "kl": _finite(self.logits.kl),
                "agreement": self.logits.agreement,
                "ppl_ratio": _finite(ratio),
            }
            if self.state.num_tokens:
                kinds = ("kl_latent", "nmse", "nmse_without_first")
                given |= {kind: _finite(getattr(self.state, kind)) for kind in kinds}
        if steps is None or (chosen := steps.chosen) is None:
            return Score(**given)
        given |= {"nfe": chosen.mean, "nfe_with_keys": chosen.mean_with_keys(steps.k)}
        return AdaptiveScore(**given, threshold=chosen.threshold)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.inference_mode()
def score(
    predictors: list[Predictor],
    store: Store,
    teacher: Teacher,
    *,
    batch_tokens: int,
    compute_dtype: ComputeDtype,
    device: str,
    timed_batches: int = 0,
) -> list[Score]:
    """What every predictor reaches over the whole validation split.

    Parameters
    ----------
    predictors
        Compared with the teacher's logits, which are computed once for each block's end.

    Raises
    ------
    TeacherError
        If the teacher's own logits are not finite.
    """
    stored = states_at_hand(store, teacher)
    start = min((one.block[0] for one in predictors if one.block), default=max(stored))
    dtype = resolve_compute_dtype(compute_dtype, device)
    tail = Tail(teacher, start).to(device)
    cast_linear(tail, dtype)
    for one in predictors:
        if one.tail is not None:
            cast_linear(one.tail, dtype)
    measured = [Measured(one) for one in predictors]
    of_teacher = LogitMetrics()
    ends = {_end(one, stored) for one in predictors} | {max(stored)}
    starts = {one.block[0] for one in predictors if one.block}
    if any(one.enter for one in predictors) and 0 in stored:
        starts.add(0)
    reader = reader_of(store, teacher, device, live=not store.layers)
    fields = BatchFields(tuple(sorted({start} | starts | ends)))
    total = store.num_sequences("validation") * store.context * len(predictors)
    with autocast(device, dtype), progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for batch in _batches(reader, fields, batch_tokens):
            for n in sorted(ends):
                here = [one for one in measured if _end(one.predictor, stored) == n]
                totals = [of_teacher] if n == max(ends) else []
                for advanced in _compare(here, totals, tail, batch, n, teacher):
                    task.advance(advanced)
            if batch.step < timed_batches:
                _time(measured, tail, batch, start)
    return [one.score(_finite(of_teacher.perplexity)) for one in measured]


def _compare(
    measured: list[Measured], totals: list[LogitMetrics], tail: Tail, batch: Batch, n: int, teacher: Teacher
) -> Iterator[int]:
    """Add what predictors make of a batch to their sums, and the teacher to its `totals`.

    Logits are compared piece by piece of the positions: those of a whole batch would fill the memory, and
    leave the processor's cache between one pass over them and the next.
    """
    true = tail.states(batch.states[n], batch.context, start=n).flatten(0, 1)
    following = NextTokens.of(batch.tokens, batch.first_of_segment)
    lasts = [_last(one, tail, batch, n) for one in measured]
    size = max(LEAST_POSITIONS, PIECE_LOGITS // tail.vocabulary)
    for first in range(0, len(true), size):
        rows = slice(first, first + size)
        reference, targets = Reference.of(tail.logits(true[rows])), following.part(rows)
        _refuse_nan(reference, teacher)
        for each in totals:
            each.add(reference.logits, reference, targets)
        for one, last in zip(measured, lasts, strict=True):
            own = one.predictor.tail or tail
            one.logits.add(reference.logits if last is None else own.logits(last[rows]), reference, targets)
        yield len(targets.ids) * len(measured)


def _refuse_nan(reference: Reference, teacher: Teacher) -> None:
    if not reference.finite:
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
        began = time.perf_counter()
        m, n = one.predictor.block or (start, start)
        x = tail.states(x, batch.context, start=start, stop=m)
        own = one.predictor.tail or tail
        own(one.predictor.predict(x, batch.context), batch.context, start=n)
        if x.is_cuda:
            torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - began) / batch.tokens.numel()
        one.ms_per_token = min(one.ms_per_token, milliseconds)
