"""The teacher's passes over a corpus, and the thread that writes what they compute."""

import queue
import threading
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from lftpipe import progress
from lftpipe.batch import Batch, make_batch
from lftpipe.extraction.plan import Plan
from lftpipe.store import ShardKey, ShardWriter, Slot, StoreWriter
from lftpipe.teacher.logits import compute_batch
from lftpipe.teacher.trunk import Trunk

#: Computed states that may wait to be written; each is a batch of one layer.
QUEUED_STATES = 8

#: Of each split, token ids and document numbers, both (sequence, position).
Tokens = dict[str, tuple[np.ndarray, np.ndarray]]


def forward(plan: Plan, writer: StoreWriter, trunk: Trunk, tokens: Tokens) -> None:
    """Compute every pending shard, while a thread encodes and writes what was computed before.

    Parameters
    ----------
    plan
        What is extracted.
    writer
        The open store.
    trunk
        The teacher's layers.
    tokens
        Of each split, token ids and document numbers.
    """
    head = plan.load_head()
    pending = writer.pending()
    total = sum(len(key.sequences) for key in pending) * plan.context
    token_bytes = sum(plan.array_bytes().values()) / (sum(plan.wanted.values()) * plan.context)
    kept = {"hidden": plan.layers, "attention": plan.attention_layers}
    with (
        _Background(writer) as background,
        progress.task(f"extract {plan.teacher.name}", total, "tokens") as task,
    ):
        for key in pending:
            background.begin_shard(key)
            for first in range(0, len(key.sequences), plan.pass_sequences):
                rows = key.sequences[first : first + plan.pass_sequences]

                def put(array: str, layer: int | None, values: Tensor, first: int = first) -> None:
                    if layer is None or layer in kept[array]:
                        background.put(array, layer, first, values)

                batch = batch_of(tokens, key.split, rows, trunk.device)
                compute_batch(trunk, head, batch.tokens, batch.position_ids, put)
                task.advance(len(rows) * plan.context, written=progress.human_bytes(task.done * token_bytes))
            background.end_shard()


def batch_of(tokens: Tokens, split: str, rows: range, device: torch.device) -> Batch:
    """Some sequences of a split, for the trunk to compute.

    Parameters
    ----------
    tokens
        Of every split.
    split, rows
        Which of them.
    device
        The trunk's.
    """
    return make_batch(*(each[rows.start : rows.stop] for each in tokens[split]), device)


class _ShardThread:
    """Checks and writes one shard from a bounded queue, and waits for the disk."""

    def __init__(self, writer: StoreWriter, key: ShardKey) -> None:
        self._queue: queue.Queue[Slot | None] = queue.Queue(QUEUED_STATES)
        self._opened = threading.Event()
        self._shard: ShardWriter | None = None
        self._error: BaseException | None = None
        self._aborted = False
        self._thread = threading.Thread(target=self._run, args=(writer, key), daemon=True)
        self._thread.start()

    def put(self, array: str, layer: int | None, first: int, values: Tensor) -> None:
        """Round a batch and queue it, waiting while the queue is full.

        It is rounded here, by all of torch's threads, to where it will be written from: each of them would
        wait for a thread that takes a core for it.
        """
        self._opened.wait()
        self.raise_error()
        assert self._shard is not None
        slot = self._shard.slot(array, layer, first, len(values))
        for out, sequence in zip(torch.from_numpy(slot.values), values, strict=True):
            if sequence.dtype == torch.bfloat16:  # directly to float16 takes torch six times as long
                sequence = sequence.float()  # one by one they stay in the processor's cache
            out.copy_(sequence)
        self._queue.put(slot)

    def end(self) -> None:
        """All of the shard is queued."""
        self.raise_error()
        self._queue.put(None)

    def abort(self) -> None:
        """Discard the shard."""
        self._aborted = True
        with suppress(queue.Empty):  # what is queued no longer matters; the end must fit in
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join()

    def join(self) -> None:
        """Wait until the ended shard is on the disk."""
        self._thread.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what went wrong in the thread, if anything did by now."""
        if self._error:
            raise self._error

    def _run(self, writer: StoreWriter, key: ShardKey) -> None:
        ended = False
        try:
            with writer.shard(key) as self._shard:
                self._opened.set()
                while slot := self._queue.get():
                    self._shard.write(slot)
                ended = True
                if self._aborted:
                    raise InterruptedError
        except BaseException as error:  # whatever it is, the caller hears of it
            self._error = error
            self._opened.set()
            # The caller may be waiting for room. After the end mark it puts nothing more.
            while not (ended or self._aborted) and self._queue.get() is not None:
                pass


class _Background:
    """Writes behind the teacher's back: one shard fills while the one before waits for the disk.

    Most of it is done without Python's lock, so that the teacher hardly waits. Shards are committed
    in order. An error of a thread is raised in the caller; an error of the caller discards the
    shard that is being written, not the one that is whole.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._current: _ShardThread | None = None
        self._before: _ShardThread | None = None

    def begin_shard(self, key: ShardKey) -> None:
        self._current = _ShardThread(self._writer, key)

    def put(self, array: str, layer: int | None, first: int, values: Tensor) -> None:
        """Queue a batch of the current shard; waits while the queue is full."""
        assert self._current is not None, "no shard was begun"
        if self._before:
            self._before.raise_error()  # at once: the current shard may take minutes to fill
        self._current.put(array, layer, first, values)

    def end_shard(self) -> None:
        """All of the current shard is queued; it may be committed once the one before is."""
        self._wait()
        assert self._current is not None, "no shard was begun"
        self._current.end()
        self._before, self._current = self._current, None

    def _wait(self) -> None:
        before, self._before = self._before, None
        if before:
            before.join()

    def __enter__(self) -> "_Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._current:
            self._current.abort()
        if kind is None:
            self._wait()
        else:
            with suppress(Exception):  # the caller's error is the one to tell
                self._wait()
