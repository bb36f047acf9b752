"""The order of the chunks in a shard file: that of the batches, whatever order they were computed in.

A trunk hands over all layers of one batch, then those of the next one; a trunk whose layers are streamed
hands over all batches of one layer first. Digests are of whole files, so both must make equal files.
"""

from collections.abc import Callable, Iterator

from lftpipe.objects import LocalStorage
from lftpipe.store.chunk_reader import ChunkReader
from lftpipe.store.layout import ArrayLayout
from lftpipe.store.shard import ChunkWriter, Record


def batch_order(array: ArrayLayout, kept: int, end: int, batch_sequences: int) -> Iterator[int]:
    """The chunks of a shard: what an older file held, then batch for batch the layers one after the other.

    Parameters
    ----------
    kept
        Sequences of the shard that an older, shorter file held.
    """
    starts = [0, *range(kept, end, batch_sequences)] if kept else range(0, end, batch_sequences)
    for first in starts:
        stop = kept if first < kept else min(first + batch_sequences, end)
        for layer in array.layers or (None,):
            chunk = array.chunk_number(layer, first)
            yield from range(chunk, chunk + stop - first)


def seal_in_order(
    writer: ChunkWriter, order: list[int], sequences: int, copy: Callable[[], ChunkWriter]
) -> Record:
    """Seal a shard file; one whose chunks came in another order is copied into that order.

    Parameters
    ----------
    copy
        Opens a file of another name for the copy, which then replaces the first.
    """
    record = writer.seal(sequences)
    if writer.order() == order:
        return record
    path = writer.path
    source = ChunkReader(LocalStorage(path.parent), path.name, writer.num_chunks)
    target = copy()
    try:
        for chunk in order:
            target.put(chunk, source.read(chunk))
        record = target.seal(sequences)
        target.path.replace(path)
    except BaseException:
        target.discard()
        raise
    return record
