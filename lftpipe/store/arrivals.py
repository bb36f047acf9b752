"""Reading a rolling store: who needs a shard that is not there waits for its producer."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from lftpipe.base.errors import StoreError
from lftpipe.store.batches import Batch, Buffer
from lftpipe.store.shard_reader import AbsentShardError, Shards
from lftpipe.store.windows import Windows, producer_lives, registered

#: Seconds between two looks at the disk.
POLL = 0.1

#: Seconds without a producer after which nobody waits any longer: one that was killed may be started again.
PATIENCE = 300.0

#: Seconds of waiting before a word is said, and between one and the next.
SILENT, SAY_EVERY = 2.0, 30.0

#: Reads the batch of a step into a buffer.
Fill = Callable[[int, Buffer], Batch]


class Arrivals:
    """Batches of a rolling store, each read once all of its shards are there."""

    def __init__(self, path: Path, windows: Windows, shards: Shards, say: Callable[[str], object]) -> None:
        self._path, self._windows, self._shards, self._say = path, windows, shards, say
        self._open: set[int] = set()
        self.stop = threading.Event()

    def patient(self, fill: Fill, batch_size: int) -> Fill:
        """Read batches, each again and again until all of it is there.

        `fill`: reads the batch of a step; raises AbsentShardError if a shard is not there.

        Returns
        -------
        callable
            Like ``fill``; raises StoreError if there is no producer for long.
        """

        def read(step: int, buffer: Buffer) -> Batch:
            first, last = step * batch_size, (step + 1) * batch_size - 1
            needed = {self._windows.number(each) for each in (first, last)}
            if needed != self._open:
                self._shards.let_go()
                self._open = needed
            while True:
                try:
                    return fill(step, buffer)
                except AbsentShardError as error:
                    self._wait(error.file, max(needed))

        return read

    def _wait(self, file: str, window: int) -> None:
        started = seen = time.monotonic()
        said = started - SAY_EVERY + SILENT
        while not (self._path / file).exists():
            now = time.monotonic()
            if producer_lives(self._path):
                seen = now
            elif now - seen > PATIENCE:
                raise StoreError(
                    f"{file} of the rolling store {self._path}, without a process that makes it",
                    "`lftpipe extract --rolling` beside this run",
                    "start it again with the command that began the store, then this run with --resume",
                )
            if now - said > SAY_EVERY:
                said = now
                self._say(f"waiting for window {window} of {self._path} ({self._reason(window)})")
            if self.stop.wait(POLL):
                raise InterruptedError("no more batches are wanted")

    def _reason(self, window: int) -> str:
        """Why it is not there, as far as one can see."""
        if not producer_lives(self._path):
            return "nobody makes it: run `lftpipe extract --rolling`"
        readers = registered(self._path).values()
        last = min(readers, key=lambda reader: reader.position, default=None)
        if last is not None and (behind := self._windows.number(last.position)) < window - 1:
            return f"{last.run} is at window {behind} and comes first"
        return "it is being made"
