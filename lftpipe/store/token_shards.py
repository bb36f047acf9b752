"""The tokens of a store in the making: written shard by shard, compared where they are stored already."""

from typing import TYPE_CHECKING

import numpy as np

from lftpipe.errors import StoreError
from lftpipe.store.chunk_reader import ChunkReader
from lftpipe.store.layout import ArrayLayout, ShardKey
from lftpipe.store.shard import DamagedShardError

if TYPE_CHECKING:
    from lftpipe.store.writer import StoreWriter


def put_tokens(writer: "StoreWriter", key: ShardKey, begin: int, parts: dict[str, np.ndarray]) -> None:
    """Store one shard's tokens from sequence ``begin`` on, and compare those that are stored already."""
    arrays = [writer.spec.arrays[name] for name in parts]
    origin = key.sequences.start
    try:
        stored = min(writer.stored(key, array) for array in arrays)
        for array in arrays:
            _compare(writer, array, key, parts[array.name][: max(origin + stored - begin, 0)], begin - origin)
    except (DamagedShardError, FileNotFoundError) as error:
        if writer.complete:
            raise StoreError(str(error), "an undamaged store", "run `lftpipe extract --repair`") from None
        writer.forget({array.file(key.split, key.index) for array in arrays})
        stored = 0
    if stored == len(key.sequences):
        return
    rest = key.sequences[stored:]
    if begin > rest.start:
        raise ValueError(f"tokens of {key.split} sequence {rest.start} must be put before those of {begin}")
    with writer.shard(ShardKey(key.split, key.index, rest), arrays) as shard:
        for name, part in parts.items():
            shard.put(name, None, 0, part[rest.start - begin :])


def _compare(
    writer: "StoreWriter", array: ArrayLayout, key: ShardKey, given: np.ndarray, within: int
) -> None:
    if not len(given):
        return
    reader = ChunkReader(writer.storage, array.file(key.split, key.index), array.chunks_per_shard)
    stored = np.empty(array.chunk, array.dtype)
    for chunk, row in enumerate(given, start=within):
        if not np.array_equal(reader.read(chunk, stored), row):
            sequence = key.sequences.start + chunk
            raise StoreError(
                f"{array.name} of {key.split} sequence {sequence} are not the stored ones",
                "the corpus and the tokenizer the store was begun with",
                "use those, name another --store, or start over (--force)",
            )
