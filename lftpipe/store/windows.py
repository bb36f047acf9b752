"""The windows of a rolling store: shards of `train` whose states come, are used, and are dropped together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lftpipe.store.codec import encoded_bytes
from lftpipe.store.layout import ArrayLayout, ShardKey, StoreSpec
from lftpipe.store.lossless import OVERHEAD

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
