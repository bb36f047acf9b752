"""Windows of a rolling store, and the files by which its producer and its readers know each other."""

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lftpipe.base.errors import StoreError
from lftpipe.base.files import fingerprint, read_sealed, write_sealed
from lftpipe.store.codec import OVERHEAD, encoded_bytes
from lftpipe.store.layout import ArrayLayout, ShardKey, StoreSpec

# --- The windows of a rolling store: shards of `train` whose states come, are used, and are dropped together.

#: The split whose states roll; those of validation always stay.
ROLLING_SPLIT = "train"


def rolls(spec: StoreSpec, split: str, array: ArrayLayout) -> bool:
    """Whether the shards of an array come and go."""
    return bool(spec.rolling) and split == ROLLING_SPLIT and array.computed


@dataclass(frozen=True)
class Windows:
    """Where the windows of a rolling store lie.

    Positions count sequences from the beginning of training, and windows are numbered through all epochs: a
    store of three windows has its first again as number 3.
    """

    spec: StoreSpec

    @property
    def sequences(self) -> int:
        """Of a window, but for the last one, which may have fewer."""
        return self.spec.rolling * self.spec.sequences_per_shard

    @property
    def total(self) -> int:
        """Sequences of all windows."""
        return self.spec.sequences[ROLLING_SPLIT]

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.total // self.sequences)

    def number(self, position: int) -> int:
        """The window that a position lies in."""
        epoch, within = divmod(position, self.total)
        return epoch * self.count + within // self.sequences

    def end(self, number: int) -> int:
        """The position behind a window."""
        epoch, window = divmod(number, self.count)
        return epoch * self.total + min((window + 1) * self.sequences, self.total)

    def keys(self, number: int) -> Iterator[ShardKey]:
        """The shards of a window, in order."""
        step, window = self.spec.sequences_per_shard, number % self.count
        for first in range(window * self.sequences, self.end(window), step):
            yield ShardKey(ROLLING_SPLIT, first // step, range(first, min(first + step, self.total)))

    def shard_bytes(self, key: ShardKey) -> int:
        """The most bytes that the states of a shard can take."""
        return most_bytes(self.spec, len(key.sequences))

    def window_bytes(self, number: int) -> int:
        """The most bytes that the states of a window can take."""
        return sum(map(self.shard_bytes, self.keys(number)))

    def files(self, key: ShardKey) -> list[str]:
        """The files of a shard that come and go."""
        return [each.file(key.split, key.index) for each in self.spec.arrays.values() if each.computed]


def most_bytes(spec: StoreSpec, sequences: int) -> int:
    """The most bytes that the files of a shard can take, of all arrays that the teacher computes."""
    total = 0
    for array in spec.arrays.values():
        if array.computed:
            layers = 1 if array.layers is None else len(array.layers)
            total += 16 * array.chunks_per_shard + 4 + layers * sequences * (_most_of_a_chunk(array) + 4)
    return total


def _most_of_a_chunk(array: ArrayLayout) -> int:
    if array.codec == "int8":
        positions, features = array.chunk
        return encoded_bytes(positions, features, positions * features // 256 + 1)
    plain = math.prod(array.chunk) * np.dtype(array.dtype).itemsize
    return plain + (OVERHEAD if array.codec else 0)


# --- How the producer of a rolling store and the runs that read it know of each other: small files in the
# store.
#
# `readers/NAME.json` says where a run stands. A run that leaves takes its file away and leaves
# `readers/left`, so that nobody waits for a run that came and went unseen. `producer.lock` is locked
# (flock) while a producer lives.

READERS, LEFT, PRODUCER = "readers", "left", "producer.lock"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A run that reads a rolling store, as it stood at its last checkpoint."""

    run: str
    """Its folder, absolute."""
    begun: str
    """A file that is there as long as the run is."""
    finished: str
    """A file that is there once the run is finished."""
    position: int
    """Sequences that its last checkpoint has passed, through all epochs."""
    end: int
    """Sequences that it passes in all."""
    batch: int
    """Sequences of a batch."""

    @property
    def is_over(self) -> bool:
        """Whether the run needs nothing any more: it is finished, or its folder is gone."""
        return Path(self.finished).exists() or not Path(self.begun).exists()

    @property
    def name(self) -> str:
        """Of its file, beside those of all others."""
        return f"{Path(self.run).name}-{fingerprint(self.run)[:8]}.json"


def register(store: Path, reader: Reader) -> None:
    """Say where a run stands: windows before it may be dropped, those after it are needed."""
    (store / READERS).mkdir(exist_ok=True)
    write_sealed(store / READERS / reader.name, asdict(reader))


def unregister(store: Path, reader: Reader) -> None:
    """Say that a run needs nothing any more."""
    _take_off(store / READERS / reader.name)


def was_left(store: Path) -> bool:
    """Whether a run that read a store needed nothing any more, at any time before."""
    return (store / READERS / LEFT).exists()


def registered(store: Path) -> dict[Path, Reader]:
    """The runs that a store is read by, and the file of each; those that are over are taken off."""
    found = {}
    for file in sorted((store / READERS).glob("*.json")):
        try:
            reader = Reader(**read_sealed(file))
        except FileNotFoundError:
            continue  # taken off just now
        except (ValueError, TypeError):
            raise StoreError(
                f"damaged {file}", "what a run wrote there", "delete the file; the run writes it again"
            ) from None
        if reader.is_over:
            _take_off(file)
        else:
            found[file] = reader
    return found


def _take_off(file: Path) -> None:
    if file.parent.is_dir():  # nobody registered: there is nothing to leave
        file.with_name(LEFT).touch()  # first: a kill in between is seen at the next look
        file.unlink(missing_ok=True)


@contextmanager
def producing(store: Path) -> Iterator[None]:
    """Be known to live to all that wait for shards.

    `store`: the store's folder, of which this process is the one writer.
    """
    lock = os.open(store / PRODUCER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who asks for it holds it for an instant
        yield
    finally:
        os.close(lock)


def producer_lives(store: Path) -> bool:
    """Whether a process makes the shards of a store."""
    try:
        lock = os.open(store / PRODUCER, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
