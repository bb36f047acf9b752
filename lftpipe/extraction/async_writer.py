"""Threads that check, encode and write what the teacher has computed, while it goes on computing."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from torch import Tensor

from lftpipe.extraction.device_to_host import Direct, Sent, Transfer
from lftpipe.store import Sealed, ShardKey, ShardWriter

#: Bytes of computed states that may wait to be written: a few batches of one layer.
QUEUED_BYTES = 64 * 2**20

#: Shards that are being filled or wait for the disk.
SHARDS_IN_FLIGHT = 2

#: Opens a shard to be written under names of its own.
Open = Callable[[ShardKey], AbstractContextManager[ShardWriter]]
#: Takes a shard that is on the disk.
Commit = Callable[[Sealed], object]


class _BoundedQueue:
    """First in, first out, with no more than so many bytes waiting; one item always fits."""

    def __init__(self, limit: int) -> None:
        self._items: deque[Sent | None] = deque()
        self._limit, self._bytes = limit, 0
        self._changed = threading.Condition()

    def put(self, item: Sent | None) -> None:
        """Append, waiting for room; None marks the end and always fits."""
        size = item.num_bytes if item else 0
        with self._changed:
            self._changed.wait_for(lambda: not self._items or not size or self._bytes + size <= self._limit)
            self._items.append(item)
            self._bytes += size
            self._changed.notify_all()

    def get(self) -> Sent | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items))
            item = self._items.popleft()
            self._bytes -= item.num_bytes if item else 0
            self._changed.notify_all()
            return item

    def clear(self) -> None:
        with self._changed:
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()


class _ShardThread:
    """Writes one shard from a bounded queue, waits for the disk, commits it after the one before."""

    def __init__(
        self, opening: Open, key: ShardKey, commit: Commit, transfer: Transfer, before: "_ShardThread | None"
    ) -> None:
        self._queue = _BoundedQueue(QUEUED_BYTES)
        self._opened = threading.Event()
        self._shard: ShardWriter | None = None
        self._error: BaseException | None = None
        self._aborted = False
        self._transfer, self._before = transfer, before
        self._thread = threading.Thread(target=self._run, args=(opening, key, commit), daemon=True)
        self._thread.start()

    def put(self, array: str, layer: int | None, first: int, values: Tensor) -> None:
        """Move a batch to where it is written from and queue it, waiting while the queue is full."""
        self._opened.wait()
        self.raise_error()
        assert self._shard is not None
        self._queue.put(self._transfer.send(self._shard, array, layer, first, values))

    def end(self) -> None:
        """All of the shard is queued."""
        self.raise_error()
        self._queue.put(None)

    def abort(self) -> None:
        """Discard the shard."""
        self._aborted = True
        self._queue.clear()  # what is queued no longer matters
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

    def _run(self, opening: Open, key: ShardKey, commit: Commit) -> None:
        ended = False
        try:
            with opening(key) as self._shard:
                self._opened.set()
                while sent := self._queue.get():
                    self._shard.write(sent.slot())
                ended = True
                if self._aborted:
                    raise InterruptedError
            assert self._shard.sealed is not None
            if self._before:
                self._wait_for(self._before)
            commit(self._shard.sealed)
        except BaseException as error:  # whatever it is, the caller hears of it
            self._error = error
            self._opened.set()
            self._transfer.close()
            # The caller may be waiting for room. After the end mark it puts nothing more.
            while not (ended or self._aborted) and self._queue.get() is not None:
                pass
        finally:
            self._before = None

    def _wait_for(self, before: "_ShardThread") -> None:
        try:
            before.join()
        except BaseException:
            assert self._shard is not None
            self._shard.discard()
            raise


class Background:
    """Writes behind the teacher's back: one shard fills while those before wait for the disk.

    Most of it is done without Python's lock, so that the teacher hardly waits. Shards are committed
    in order. An error of a thread is raised in the caller; an error of the caller discards the
    shard that is being written, not those that are whole.

    `commit`: called with every shard that is on the disk, in the order in which they were begun, by a thread.
    `transfer`: moves batches; left out, they are rounded in the calling thread.
    `in_flight`: shards that are being filled or wait for the disk.
    """

    def __init__(
        self,
        opening: Open,
        commit: Commit,
        transfer: Transfer | None = None,
        in_flight: int = SHARDS_IN_FLIGHT,
    ) -> None:
        self._opening, self._commit = opening, commit
        self._transfer: Transfer = transfer or Direct()
        self._in_flight = in_flight
        self._current: _ShardThread | None = None
        self._ended: deque[_ShardThread] = deque()

    def begin_shard(self, key: ShardKey) -> None:
        """Open the next shard."""
        before = self._ended[-1] if self._ended else None
        self._current = _ShardThread(self._opening, key, self._commit, self._transfer, before)

    def put(self, array: str, layer: int | None, first: int, values: Tensor) -> None:
        """Queue a batch of the current shard; waits while the queue is full.

        `array`, `layer`: which array of the shard, and which layer of it.
        """
        assert self._current is not None, "no shard was begun"
        self._raise_errors()  # at once: the current shard may take minutes to fill
        try:
            self._current.put(array, layer, first, values)
        except InterruptedError:  # there is no room any more, because of an error
            self._raise_errors()
            self._current.raise_error()
            raise

    def _raise_errors(self) -> None:
        for each in self._ended:
            each.raise_error()

    def end_shard(self) -> None:
        """All of the current shard is queued; it is committed once those before are."""
        while len(self._ended) > self._in_flight - 2:
            self._ended.popleft().join()
        assert self._current is not None, "no shard was begun"
        self._current.end()
        self._ended.append(self._current)
        self._current = None

    def _wait(self) -> None:
        while self._ended:
            self._ended.popleft().join()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._current:
            self._current.abort()
        if kind is None:
            self._wait()
        else:
            with suppress(Exception):  # the caller's error is the one to tell
                self._wait()
