"""One shard of several arrays in the making: values are checked, encoded and appended as they come."""

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lftpipe.errors import StoreError
from lftpipe.manifest import sync_folder
from lftpipe.store.codec import encode
from lftpipe.store.journal import Records, disk_errors
from lftpipe.store.layout import ArrayLayout, ShardKey
from lftpipe.store.shard import ChunkReader, ChunkWriter, DamagedShardError

# dtype -> signed and unsigned type of its bits, and those of infinity and -infinity: where no value's bits
# reach the first as a signed number, nor the second as an unsigned one, all are finite.
_BITS = {
    "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "float32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}


class ShardWriter:
    """Takes blocks of sequences of one layer in any order and holds no more than one chunk of them."""

    def __init__(
        self, store: Path, key: ShardKey, arrays: list[ArrayLayout], sequences_per_shard: int
    ) -> None:
        """Use `StoreWriter.shard`."""
        self.key = key
        self._arrays = {array.name: array for array in arrays}
        self._origin = key.index * sequences_per_shard
        self._files = {array.name: array.file(key.split, key.index) for array in arrays}
        self._store = store
        self._chunks: dict[str, ChunkWriter] = {}
        kinds = {(array.dtype, array.chunk) for array in arrays}
        self._values = {(dtype, chunk): np.empty(chunk, dtype) for dtype, chunk in kinds}

    def put(
        self, array: str, layer: int | None, first: int, block: Shaped[np.ndarray, "sequence position ..."]
    ) -> None:
        """Append some sequences of one layer.

        Parameters
        ----------
        array
            ``"hidden"``, ``"attention"`` or one of the logits' arrays.
        layer
            The layer l itself, not its index; None for logits.
        first
            Which of ``key.sequences`` the block begins with.
        block
            Float16 or float32, (sequence, position, feature); ids are int32. What has the storage dtype is
            taken as it is, without a copy; numpy rounds float32 to float16 more slowly than the disk writes.

        Raises
        ------
        StoreError
            If a value is not finite or too large for the storage dtype, or the disk is full.
        ValueError
            If the block does not fit the shard, or a sequence is put twice.
        """
        layout = self._arrays[array]
        begin = self.key.sequences.start + first - self._origin
        if first < 0 or first + len(block) > len(self.key.sequences) or block.shape[1:] != layout.chunk:
            raise ValueError(
                f"a block of shape {block.shape} at {first} does not fit {len(self.key.sequences)} sequences "
                f"of {layout.chunk}"
            )
        for within, values in enumerate(block, start=begin):
            values = self._storable(layout, layer, within, values)
            encoded = encode(values) if layout.coded else values
            with disk_errors(self._store):
                self._chunks[array].put(layout.chunk_number(layer, within), encoded)

    def begin(self) -> None:
        """Open the files; when a store grows, copy what the last shard holds from the file to be replaced."""
        kept = self.key.sequences.start - self._origin
        with disk_errors(self._store):
            for name, array in self._arrays.items():
                self._chunks[name] = ChunkWriter(self._store / self._files[name], array.chunks_per_shard)
        for name, array in self._arrays.items() if kept else ():
            try:
                old = ChunkReader(self._store / self._files[name], array.chunks_per_shard)
                for layer in array.layers or (None,):
                    for chunk in range(*(array.chunk_number(layer, within) for within in (0, kept))):
                        self._chunks[name].put(chunk, old.read(chunk))
            except DamagedShardError as error:
                raise StoreError(
                    str(error), "a shard as it was written", "run `lftpipe extract --repair`"
                ) from None

    def seal(self) -> Records:
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
        return {self._files[name]: self._chunks[name].seal(end) for name in self._arrays}

    def publish(self) -> None:
        """Give the files their names, for good."""
        for name, file in self._files.items():
            self._chunks[name].path.replace(self._store / file)
        for file in self._files.values():
            sync_folder((self._store / file).parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        for chunks in self._chunks.values():
            chunks.discard()

    def _storable(
        self, layout: ArrayLayout, layer: int | None, within: int, values: np.ndarray
    ) -> np.ndarray:
        """The values as they are stored, C-contiguous, checked to be finite."""
        given = values
        if values.dtype != layout.dtype or not values.flags.c_contiguous:
            values = self._values[layout.dtype, layout.chunk]
            with np.errstate(over="ignore"):  # an overflow gives an infinity, which is reported below
                np.copyto(values, given, casting="same_kind")
        if layout.dtype in _BITS:
            signed, infinity, unsigned, minus_infinity = _BITS[layout.dtype]
            if values.view(signed).max() >= infinity or values.view(unsigned).max() >= minus_infinity:
                raise self._not_finite(layout, layer, within, given)
        return values

    def _not_finite(
        self, layout: ArrayLayout, layer: int | None, within: int, values: np.ndarray
    ) -> StoreError:
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(values.astype(layout.dtype)))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        array = layout.name if layer is None else f"{layout.name} layer {layer}"
        axes = ("channel" if axis == "feature" else axis for axis in layout.axes)
        place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, bad[0], strict=True))
        return StoreError(
            f"{values[tuple(bad[0])]:g} in {array}, {self.key.split} sequence {self._origin + within}, "
            f"{place}{more}",
            f"finite values within {np.finfo(layout.dtype).max:g}",
            "use --dtype float32 if it is only too large, else --compute-dtype float32; look at the teacher",
        )
