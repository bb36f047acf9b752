"""The teacher's passes over a corpus, and the thread that writes what they compute."""

import queue
import threading
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lftpipe import progress
from lftpipe.packing import positions
from lftpipe.plan import Plan
from lftpipe.store import ShardKey, StoreWriter
from lftpipe.teacher.head import compute_batch
from lftpipe.teacher.trunk import Trunk

#: Computed states that may wait to be written; each is a batch of one layer.
QUEUED_STATES = 8

#: Of each split, token ids and document numbers, both (sequence, position).
Tokens = dict[str, tuple[np.ndarray, np.ndarray]]


def forward(plan: Plan, writer: StoreWriter, trunk: Trunk, tokens: Tokens) -> None:
    """Compute every pending shard, while a thread encodes and writes what was computed before."""
    head = plan.load_head()
    pending = writer.pending()
    total = sum(len(key.sequences) for key in pending) * plan.context
    token_bytes = sum(plan.array_bytes().values()) / (sum(plan.wanted.values()) * plan.context)
    kept = {"hidden": plan.layers, "attention": plan.attention_layers}
    with (
        _Background(writer, pending) as background,
        progress.task(f"extract {plan.teacher.name}", total, "tokens") as task,
    ):
        for key in pending:
            for first in range(0, len(key.sequences), plan.batch_sequences):
                rows = key.sequences[first : first + plan.batch_sequences]

                def put(array: str, layer: int | None, values: Tensor, first: int = first) -> None:
                    if layer is None or layer in kept[array]:
                        background.put(_Item(array, layer, first, values))

                compute_batch(trunk, head, *batch_of(tokens, key.split, rows), put)
                task.advance(len(rows) * plan.context, written=progress.human_bytes(task.done * token_bytes))
            background.end_shard()


def batch_of(tokens: Tokens, split: str, rows: range) -> tuple[Tensor, Tensor]:
    """Token ids and position ids of some sequences, (sequence, position)."""
    ids, documents = (each[rows.start : rows.stop] for each in tokens[split])
    return torch.from_numpy(ids).long(), torch.from_numpy(positions(documents)).long()


class _Item(NamedTuple):
    """A computed batch of one layer, or of logits, on its way to the store."""

    array: str
    layer: int | None
    first: int
    """Which of the shard's sequences it begins with."""
    values: Tensor


class _Background:
    """A thread that writes one shard after the other from a bounded queue of computed states.

    Rounding, checksums, writing and waiting for the disk all happen there, and most of it without
    Python's lock, so the teacher hardly waits. An error of the thread is raised in the caller; an
    error of the caller discards the shard that is being written.
    """

    def __init__(self, writer: StoreWriter, pending: list[ShardKey]) -> None:
        self._queue: queue.Queue[_Item | None] = queue.Queue(QUEUED_STATES)
        self._error: BaseException | None = None
        self._aborted = False
        self._dtypes = {name: getattr(torch, array.dtype) for name, array in writer.spec.arrays.items()}
        self._thread = threading.Thread(target=self._run, args=(writer, pending), daemon=True)

    def put(self, item: _Item) -> None:
        """Queue a batch of the current shard; waits while the queue is full."""
        self._raise()
        self._queue.put(item)

    def end_shard(self) -> None:
        """All of the current shard is queued."""
        self._raise()
        self._queue.put(None)

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _run(self, writer: StoreWriter, pending: list[ShardKey]) -> None:
        try:
            for key in pending:
                with writer.shard(key) as shard:
                    while item := self._queue.get():
                        values = item.values.to("cpu", self._dtypes[item.array]).numpy()
                        shard.put(item.array, item.layer, item.first, values)
                    if self._aborted:
                        raise InterruptedError
        except BaseException as error:  # whatever it is, the caller hears of it
            self._error = error
            while not self._aborted and self._queue.get() is not None:  # the caller may be waiting for room
                pass

    def __enter__(self) -> "_Background":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._aborted = True
            with suppress(queue.Empty):  # what is queued no longer matters; the end must fit in
                while True:
                    self._queue.get_nowait()
            self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
