"""Students scored over the whole validation split of a store, from its cached states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import time
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from lftpipe import progress
from lftpipe.batch import Batch, BatchFields, BatchReader
from lftpipe.config.settings import ComputeDtype
from lftpipe.device import cast_linear, resolve_compute_dtype
from lftpipe.evaluation.metrics import Reference
from lftpipe.evaluation.predictors import Row
from lftpipe.store import Store
from lftpipe.teacher.parts import Tail
from lftpipe.teacher.source import Teacher


def _batches(reader: BatchReader, fields: BatchFields, batch_tokens: int) -> Iterator[Batch]:
    """The whole validation split."""
    total, size = reader.store.num_sequences("validation"), max(1, batch_tokens // reader.store.context)
    for number, start in enumerate(range(0, total, size)):
        yield reader.read("validation", range(start, min(start + size, total)), fields, number)


@torch.inference_mode()
def score(
    rows: list[Row],
    store: Store,
    teacher: Teacher,
    *,
    batch_tokens: int,
    compute_dtype: ComputeDtype,
    device: str,
    timed_batches: int = 0,
) -> None:
    """Fill in every row's metrics over the whole validation split, and its time if any batch is timed."""
    start = min((row.block[0] for row in rows if row.block), default=max(store.layers))
    dtype = resolve_compute_dtype(compute_dtype, device)
    tail = Tail(teacher, start).to(device)
    cast_linear(tail, dtype)
    ends = {_end(row, store) for row in rows}
    fields = BatchFields(tuple(sorted({start, *ends, *(row.block[0] for row in rows if row.block)})))
    reader = BatchReader(store, teacher, device)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    total = store.num_sequences("validation") * store.context * len(rows)
    with autocast, progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for batch in _batches(reader, fields, batch_tokens):
            for n, group in groupby(
                sorted(rows, key=lambda row: _end(row, store)), lambda row: _end(row, store)
            ):
                teacher_logits = tail(batch.states[n], batch.context, start=n)
                reference = Reference.of(teacher_logits)
                for row in group:
                    _add(row, tail, batch, n, teacher_logits, reference)
                    task.advance(batch.tokens.numel())
            if batch.step < timed_batches:
                _time(rows, tail, batch, start)


def _end(row: Row, store: Store) -> int:
    """The cached state whose logits a row is compared with: its block's end if stored, else the last."""
    return row.block[1] if row.block and row.block[1] in store.layers else max(store.layers)


def _add(
    row: Row,
    tail: Tail,
    batch: Batch,
    n: int,
    teacher_logits: Tensor,
    reference: Reference,
) -> None:
    if row.block is None:
        row.logits.add(teacher_logits, reference, batch.tokens, batch.first_of_segment)
        return
    predicted = row.predict(batch.states[row.block[0]], batch.context).float()
    if row.block[1] == n:
        row.state.add(predicted, batch.states[n], batch.first_of_segment)
    logits = tail(predicted, batch.context, start=row.block[1])
    row.logits.add(logits, reference, batch.tokens, batch.first_of_segment)


def _time(rows: list[Row], tail: Tail, batch: Batch, start: int) -> None:
    """Time every row over the same stretch, from `h[start]` to the logits; the fastest batch counts."""
    for row in rows:
        if row.evaluations is not None:  # its batches are evaluated whole: a clock would say nothing
            continue
        x = batch.states[start]
        began = time.perf_counter()
        m, n = row.block or (start, start)
        x = tail.states(x, batch.context, start=start, stop=m)
        tail(row.predict(x, batch.context), batch.context, start=n)
        if x.is_cuda:
            torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - began) / batch.tokens.numel()
        row.ms_per_token = min(row.ms_per_token, milliseconds)
