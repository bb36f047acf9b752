"""The producer's side of a rolling store: which shard comes next, and which may go.

The rule is one sentence: of `train`, the disk holds the windows from the hindmost run's checkpoint on, as
many as fit. So a window goes when every run's checkpoint has passed it, it comes again when a run needs it,
and the hindmost run never waits for another one.
"""

import threading
from collections.abc import Collection
from typing import NamedTuple

from lftpipe.base.errors import SettingsError
from lftpipe.store.commit_log import Sealed
from lftpipe.store.layout import ShardKey, StoreSpec, metadata
from lftpipe.store.manifest import Manifest, describe
from lftpipe.store.windows import ROLLING_SPLIT, Reader, Windows, most_bytes, rolls
from lftpipe.store.writer import StoreWriter, write_metadata


class Rolled(NamedTuple):
    """What became of the shards of one producer's life."""

    made: int
    """Shards that were computed."""
    made_again: int
    """Of these, shards that had been dropped; each had the same bytes."""
    dropped: int
    peak_bytes: int
    """The most bytes of states at a time, shards in the making included."""


class Roll:
    """The states of a rolling store that are on the disk.

    `cap`: bytes of states on the disk. Only a batch that needs more than two windows at once may exceed it,
    by less than a window.
    """

    def __init__(self, writer: StoreWriter, cap: int) -> None:
        self.windows, self.cap = Windows(writer.spec), cap
        self._writer = writer
        self._lock = threading.Lock()
        self._coming: dict[ShardKey, int] = {}
        self._stay_bytes = _bytes_that_stay(writer.spec)
        self._made = self._made_again = self._dropped = self._peak = 0
        self._here = self._whole_shards()

    @property
    def stays(self) -> list[ShardKey]:
        """What is to be made for good before runs can begin: the states of validation."""
        return [key for key in self._writer.pending() if key.split != ROLLING_SPLIT]

    def publish(self) -> None:
        """Write the manifest of what stays: from now on the store can be read.

        Raises `StoreError` if a file that an earlier process wrote has changed since.
        """
        writer, spec = self._writer, self._writer.spec
        rolling = {
            array.file(key.split, key.index)
            for key in spec.shard_keys()
            for array in spec.arrays.values()
            if rolls(spec, key.split, array)
        }
        stays = {file: each for file, each in writer.ledger.records.items() if file not in rolling}
        writer.refuse_changed(stays)
        files = metadata(spec, complete=False)  # to other programs, its training states are not all there
        write_metadata(writer.storage, files)
        described = {name: describe(data) for name, data in files.items()}
        Manifest.write(writer.path, spec, dict(sorted(stays.items())), described)

    def wanted(self, readers: Collection[Reader]) -> list[int]:
        """The windows that the disk is to hold, the most urgent first.

        `readers`: all runs that read; without any, the first windows are made ready.
        """
        windows = self.windows
        first = min((windows.number(reader.position) for reader in readers), default=0)
        # A reader may read one batch ahead of the one that it is about to be given.
        ahead = 2 * max((reader.batch for reader in readers), default=1)
        needed = windows.number(windows.end(first) + ahead - 2)
        last = max((windows.number(reader.end - 1) for reader in readers), default=first + windows.count)
        room = self.cap - self._stay_bytes
        found: list[int] = []
        for number in range(first, min(last, first + windows.count - 1) + 1):
            room -= windows.window_bytes(number)
            if room < 0 and number > needed:
                break
            found.append(number)
        return found

    def next(self, readers: Collection[Reader]) -> ShardKey | None:
        """The shard to make now, for which there is room; None while there is nothing to make.

        Shards that nobody wants any more are dropped.
        """
        wanted = [key for number in self.wanted(readers) for key in self.windows.keys(number)]
        with self._lock:
            for key in self._here.keys() - set(wanted):
                self._writer.ledger.drop(self.windows.files(key))
                self._dropped += 1
                del self._here[key]
            missing = [key for key in wanted if key not in self._here and key not in self._coming]
            if not missing:
                return None
            size = self.windows.shard_bytes(missing[0])
            used = self._stay_bytes + sum(self._here.values()) + sum(self._coming.values())
            if used + size > max(self.cap, self._allowed(wanted)):
                return None  # a shard that nobody wants is still being written
            self._coming[missing[0]] = size
            self._peak = max(self._peak, used + size)
            return missing[0]

    def commit(self, sealed: Sealed) -> None:
        """Take a shard that `next` gave."""
        with self._lock:
            again = sealed.records.keys() <= self._writer.ledger.made.keys()
            self._made += self._writer.commit(sealed)
            self._made_again += again
            del self._coming[sealed.key]
            if (size := self._bytes_of(sealed.key)) is not None:
                self._here[sealed.key] = size

    def summary(self) -> Rolled:
        """What became of the shards."""
        return Rolled(self._made, self._made_again, self._dropped, self._peak)

    def _allowed(self, wanted: Collection[ShardKey]) -> int:
        """Bytes of all that is wanted: more than the cap only where a batch needs more than two windows."""
        return self._stay_bytes + sum(map(self.windows.shard_bytes, wanted))

    def _whole_shards(self) -> dict[ShardKey, int]:
        """Whole shards on the disk, and their bytes; what a kill left of a dropped one is deleted."""
        found = {}
        for number in range(self.windows.count):
            for key in self.windows.keys(number):
                if (size := self._bytes_of(key)) is not None:
                    found[key] = size
                else:
                    self._writer.ledger.drop(self.windows.files(key))
        return found

    def _bytes_of(self, key: ShardKey) -> int | None:
        """Of a shard on the disk; None if it is not whole."""
        records = [self._writer.ledger.records.get(file) for file in self.windows.files(key)]
        whole = [record.bytes for record in records if record and record.sequences == len(key.sequences)]
        return sum(whole) if len(whole) == len(records) else None


def window_shards(spec: StoreSpec, cap: int, own: int = 0) -> int:
    """Shards in a window, so that two windows fit under a cap.

    `own`: shards in the windows of a store that is there: it keeps them.
    Raises `SettingsError` if they do not fit, naming the least that works.
    """
    each, stays = most_bytes(spec, spec.sequences_per_shard), _bytes_that_stay(spec)
    fitting = (cap - stays) // (2 * each)
    least = own or 1
    if fitting < least:
        raise SettingsError(
            f"--rolling {cap}",
            f"at least {stays + 2 * least * each}: validation's states, and two windows of {least} shards",
            "give more"
            if own
            else "give more; less is needed with fewer --layers, --validation-tokens or --shard-bytes",
        )
    return own or fitting


def _bytes_that_stay(spec: StoreSpec) -> int:
    """The most bytes of states that are never dropped."""
    return sum(
        most_bytes(spec, len(key.sequences)) for key in spec.shard_keys() if key.split != ROLLING_SPLIT
    )
