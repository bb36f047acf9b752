"""Which file each shard of a finished store is, in sixteen bytes a shard."""

from typing import NamedTuple

import numpy as np

from lftpipe.store.layout import StoreSpec
from lftpipe.store.parsing import Records, files_of
from lftpipe.store.windows import rolls


class Expected(NamedTuple):
    """Sizes and tails of the shards of one array of one split, by shard index."""

    sizes: np.ndarray
    tails: np.ndarray
    """Zero where the manifest names none, as those of old stores do not."""

    def of(self, index: int) -> tuple[int, str]:
        """Size and tail of a shard, as `ChunkReader` compares them."""
        tail = int(self.tails[index])
        return int(self.sizes[index]), f"{tail:016x}" if tail else ""


def expected_shards(spec: StoreSpec, shards: Records) -> dict[tuple[str, str], Expected]:
    """By array and split, what a manifest says of every shard.

    Parameters
    ----------
    spec, shards
        Of a manifest that was read: they fit each other.
    """
    found: dict[tuple[str, str], Expected] = {}
    for split, count in spec.sequences.items():
        for array in spec.arrays.values():
            if rolls(spec, split, array):
                continue  # the journal says it once the shard is there
            records = [shards[file] for file in files_of(array, split, count)]
            found[array.name, split] = Expected(
                np.fromiter((record.bytes for record in records), np.uint64, len(records)),
                np.fromiter((int(record.tail or "0", 16) for record in records), np.uint64, len(records)),
            )
    return found
