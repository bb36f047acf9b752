"""Students scored over the whole validation split of a store, from its cached states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lftpipe import progress
from lftpipe.config.settings import ComputeDtype
from lftpipe.corpus.packing import positions
from lftpipe.device import cast_linear, resolve_compute_dtype
from lftpipe.evaluation.metrics import Reference
from lftpipe.evaluation.predictors import Row
from lftpipe.flow.path import States
from lftpipe.store import Store
from lftpipe.teacher.family import AttentionContext, attention_context
from lftpipe.teacher.parts import (
    Tail,
    load_rotary,
)
from lftpipe.teacher.source import Teacher


@dataclass(frozen=True)
class Batch:
    """Some validation sequences; their states are read as they are needed."""

    rows: range
    tokens: Int[Tensor, "sequence position"]
    first: Bool[Tensor, "sequence position"]
    context: AttentionContext


def _batches(store: Store, batch_tokens: int, device: str, rotary: nn.Module) -> Iterator[Batch]:
    """The whole validation split, with every state that the store holds of it read on demand."""
    step = max(1, batch_tokens // store.context)
    total = store.num_sequences("validation")
    tokens, document = store.tokens("validation"), store.document("validation")
    for start in range(0, total, step):
        rows = range(start, min(start + step, total))
        places = torch.from_numpy(positions(document[start : rows.stop])).long().to(device)
        yield Batch(
            rows=rows,
            tokens=torch.from_numpy(tokens[start : rows.stop]).long().to(device),
            first=places == 0,
            context=attention_context(rotary, places),
        )


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
    rotary = load_rotary(teacher).to(device)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    total = store.num_sequences("validation") * store.context * len(rows)
    with autocast, progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for index, batch in enumerate(_batches(store, batch_tokens, device, rotary)):
            read = _Reader(store, batch.rows, device)
            for n, group in groupby(
                sorted(rows, key=lambda row: _end(row, store)), lambda row: _end(row, store)
            ):
                x_1 = read(n)
                teacher_logits = tail(x_1, batch.context, start=n)
                reference = Reference.of(teacher_logits)
                for row in group:
                    _add(row, read, tail, batch, x_1, n, teacher_logits, reference)
                    task.advance(batch.tokens.numel())
            if index < timed_batches and len(batch.rows) > 0:
                _time(rows, read, tail, batch, start)


def _end(row: Row, store: Store) -> int:
    """The cached state whose logits a row is compared with: its block's end if stored, else the last."""
    return row.block[1] if row.block and row.block[1] in store.layers else max(store.layers)


def _add(
    row: Row,
    read: "_Reader",
    tail: Tail,
    batch: Batch,
    x_1: States,
    n: int,
    teacher_logits: Tensor,
    reference: Reference,
) -> None:
    if row.block is None:
        row.logits.add(teacher_logits, reference, batch.tokens, batch.first)
        return
    predicted = row.predict(read(row.block[0]), batch.context).float()
    if row.block[1] == n:
        row.state.add(predicted, x_1, batch.first)
    logits = tail(predicted, batch.context, start=row.block[1])
    row.logits.add(logits, reference, batch.tokens, batch.first)


def _time(rows: list[Row], read: "_Reader", tail: Tail, batch: Batch, start: int) -> None:
    """Time every row over the same stretch, from `h[start]` to the logits; the fastest batch counts."""
    for row in rows:
        if row.evaluations is not None:  # its batches are evaluated whole: a clock would say nothing
            continue
        x = read(start)
        began = time.perf_counter()
        m, n = row.block or (start, start)
        x = tail.states(x, batch.context, start=start, stop=m)
        tail(row.predict(x, batch.context), batch.context, start=n)
        if x.is_cuda:
            torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - began) / batch.tokens.numel()
        row.ms_per_token = min(row.ms_per_token, milliseconds)


class _Reader:
    """States of some validation sequences, each read once."""

    def __init__(self, store: Store, rows: range, device: str) -> None:
        self._store, self._rows, self._device = store, rows, device
        self._states: dict[int, States] = {}

    def __call__(self, layer: int) -> States:
        if layer not in self._states:
            state = torch.from_numpy(self._store.read("validation", layer, self._rows))
            self._states[layer] = state.to(self._device, torch.float32)
        return self._states[layer]
