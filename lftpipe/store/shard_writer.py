"""Writing shards: encoding, the order of chunks, and files that are sealed when complete."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from lftpipe.base.errors import StoreError
from lftpipe.storage import LocalStorage, storage_of
from lftpipe.store.codec import compress, encode
from lftpipe.store.commit_log import Sealed, disk_errors
from lftpipe.store.layout import ArrayLayout, ShardKey, StoreSpec
from lftpipe.store.shard import ChunkReader, ChunkWriter, DamagedShardError, Record, Room

# --- The order of the chunks in a shard file: that of the batches, whatever order they were computed in.
#
# A trunk hands over all layers of one batch, then those of the next one; a trunk whose layers are streamed
# hands over all batches of one layer first. Digests are of whole files, so both must make equal files.


def batch_order(array: ArrayLayout, kept: int, end: int, batch_sequences: int) -> Iterator[int]:
    """The chunks of a shard: what an older file held, then batch for batch the layers one after the other.

    `kept`: sequences of the shard that an older, shorter file held.
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

    `copy`: opens a file of another name for the copy, which then replaces the first.
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


# --- One shard of several arrays in the making: values are checked, encoded and appended as they come.

# dtype -> signed and unsigned type of its bits, and those of infinity and -infinity: where no value's bits
# reach the first as a signed number, nor the second as an unsigned one, all are finite.
_BITS = {
    "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "float32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}


class Slot(NamedTuple):
    """Some sequences of one layer, to be filled where they will be written from."""

    values: Shaped[np.ndarray, "sequence position ..."]
    """To be filled; no two sequences need lie next to each other."""
    layout: ArrayLayout
    layer: int | None
    within: int
    """Which of the shard's sequences it begins with."""
    room: Room | None
    """None if it has to be encoded first."""


class ShardWriter:
    """Takes batches of sequences of one layer in any order and holds no more than some of them."""

    def __init__(
        self,
        store: Path,
        key: ShardKey,
        arrays: list[ArrayLayout],
        sequences_per_shard: int,
        free: list[np.ndarray],
        attempt: str,
        batch_sequences: int | None = None,
    ) -> None:
        """Use `produce_shard` or `StoreWriter.shard`."""
        self.key = key
        self._arrays = {array.name: array for array in arrays}
        self._origin = key.index * sequences_per_shard
        self._files = {array.name: array.file(key.split, key.index) for array in arrays}
        self._store = store
        self._free, self._attempt, self._batch = free, attempt, batch_sequences
        self.sealed: Sealed | None = None
        self._chunks: dict[str, ChunkWriter] = {}

    def dtype(self, array: str) -> str:
        """Of an array, decoded."""
        return self._arrays[array].dtype

    def slot(self, array: str, layer: int | None, first: int, count: int) -> Slot:
        """Memory for some sequences of one layer, to be filled and given to `write`.

        One thread may take and fill slots while another writes those before; they are written in the
        order in which they are taken.

        `layer`: the layer l itself, not its index; None for logits.
        """
        layout = self._arrays[array]
        if first < 0 or first + count > len(self.key.sequences):
            raise ValueError(f"{count} sequences at {first} do not fit a shard of {len(self.key.sequences)}")
        within = self.key.sequences.start + first - self._origin
        if layout.codec:
            return Slot(np.empty((count, *layout.chunk), layout.dtype), layout, layer, within, None)
        chunk_bytes = np.dtype(layout.dtype).itemsize * math.prod(layout.chunk)
        room = self._chunks[array].room(count, chunk_bytes)
        return Slot(room.values(layout.dtype, layout.chunk), layout, layer, within, room)

    def write(self, slot: Slot) -> None:
        """Check, encode and append a slot that was filled.

        Raises `StoreError` if a value is not finite or too large for the storage dtype, or the disk is full.
        """
        chunks = self._chunks[slot.layout.name]
        for number, values in enumerate(slot.values):
            within = slot.within + number
            self._check(slot, within, values)
            chunk = slot.layout.chunk_number(slot.layer, within)
            with disk_errors(self._store):
                if slot.room:
                    chunks.fill(slot.room, number, chunk)
                else:
                    code = compress if slot.layout.codec == "blosc" else encode
                    chunks.put(chunk, code(values))

    def put(
        self, array: str, layer: int | None, first: int, block: Shaped[np.ndarray, "sequence position ..."]
    ) -> None:
        """Append a copy of some sequences of one layer: `slot` and `write` in one.

        `layer`: the layer l itself, not its index; None for logits.
        `block`: float16 or float32, (sequence, position, feature); ids are int32. numpy rounds float32 to
        float16 more slowly than the disk writes.
        """
        if block.shape[1:] != (chunk := self._arrays[array].chunk):
            raise ValueError(f"a block of shape {block.shape} does not hold sequences of {chunk}")
        slot = self.slot(array, layer, first, len(block))
        with np.errstate(over="ignore"):  # an overflow gives an infinity, which is reported
            np.copyto(slot.values, block, casting="same_kind")
        self.write(slot)

    def begin(self) -> None:
        """Open the files; when a store grows, copy what the last shard holds from the file to be replaced."""
        kept = self.key.sequences.start - self._origin
        with disk_errors(self._store):
            for name in self._arrays:
                if not (folder := (self._store / self._files[name]).parent).is_dir():
                    folder.mkdir(parents=True)  # where a store is made that will not lie here
                self._chunks[name] = self._open(name, self._attempt)
        for name, array in self._arrays.items() if kept else ():
            try:
                old = ChunkReader(storage_of(self._store), self._files[name], array.chunks_per_shard)
                for layer in array.layers or (None,):
                    for chunk in range(*(array.chunk_number(layer, within) for within in (0, kept))):
                        self._chunks[name].put(chunk, old.read(chunk))
            except DamagedShardError as error:
                raise StoreError(str(error), "an undamaged shard", "run `lftpipe extract --repair`") from None

    def seal(self) -> Sealed:
        """Write the indices and wait for the disk; the files still have their temporary names."""
        end = self.key.sequences.stop - self._origin
        for name, array in self._arrays.items():
            for layer in array.layers or (None,):
                start = array.chunk_number(layer, 0)
                if (gap := self._chunks[name].missing(range(start, start + end))) is not None:
                    sequence = self._origin + gap - start
                    raise ValueError(
                        f"{name} layer {layer} of {self.key.split} sequence {sequence} was never put"
                    )
        records = {self._files[name]: self._seal(name, end) for name in self._arrays}
        return Sealed(self.key, self._attempt, records)

    def _seal(self, name: str, end: int) -> Record:
        """One array's file, with its chunks in the order of the batches."""
        array, chunks = self._arrays[name], self._chunks[name]
        if self._batch is None:
            return chunks.seal(end)
        order = batch_order(array, self.key.sequences.start - self._origin, end, self._batch)
        return seal_in_order(
            chunks,
            list(order),
            end,
            lambda: self._open(name, f"{self._attempt}-sorted"),
        )

    def _open(self, name: str, attempt: str) -> ChunkWriter:
        path = self._store / self._files[name]
        return ChunkWriter(path, self._arrays[name].chunks_per_shard, self._free, attempt)

    def discard(self) -> None:
        """Leave nothing behind."""
        for chunks in self._chunks.values():
            chunks.discard()

    def _check(self, slot: Slot, within: int, values: np.ndarray) -> None:
        if slot.layout.dtype not in _BITS:
            return
        signed, infinity, unsigned, minus_infinity = _BITS[slot.layout.dtype]
        if values.view(signed).max() < infinity and values.view(unsigned).max() < minus_infinity:
            return
        bad = np.argwhere(~np.isfinite(values))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        layout = slot.layout
        array = layout.name if slot.layer is None else f"{layout.name} layer {slot.layer}"
        axes = ("channel" if axis == "feature" else axis for axis in layout.axes)
        place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, bad[0], strict=True))
        raise StoreError(
            f"{values[tuple(bad[0])]:g} in {array}, {self.key.split} sequence {self._origin + within}, "
            f"{place}{more}",
            f"finite values within {np.finfo(layout.dtype).max:g}",
            "use --dtype float32 if it is only too large, else --compute-dtype float32; look at the teacher",
        )


@contextmanager
def produce_shard(
    path: Path,
    spec: StoreSpec,
    key: ShardKey,
    attempt: str,
    *,
    arrays: list[ArrayLayout] | None = None,
    free: list[np.ndarray] | None = None,
) -> Iterator[ShardWriter]:
    """Write a shard under names of its own: no lock is taken, and the store does not know of it yet.

    `path`, `spec`: the store, begun by a `StoreWriter`, which alone can take the shard into it
    (`StoreWriter.commit`).
    `attempt`: no other attempt at this shard may have this name.
    `arrays`: left out, all that the teacher computes.
    Yields to be filled; afterwards it has `sealed`. An error within leaves nothing behind.
    """
    computed = [array for array in spec.arrays.values() if array.computed]
    shard = ShardWriter(
        path,
        key,
        arrays or computed,
        spec.sequences_per_shard,
        [] if free is None else free,
        attempt,
        None if arrays else spec.identity.get("batch_sequences"),
    )
    try:
        shard.begin()
        yield shard
        with disk_errors(path):
            shard.sealed = shard.seal()
    except BaseException:
        shard.discard()
        raise
