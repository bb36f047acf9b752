"""The shard files of a finished store, opened when they are first needed, each compared with the manifest."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lftpipe.base.errors import StoreError
from lftpipe.base.files import most_open_files
from lftpipe.storage import storage_of
from lftpipe.store.codec import decode, decompress, widen
from lftpipe.store.layout import ArrayLayout, StoreSpec
from lftpipe.store.manifest import newest_record
from lftpipe.store.records import Expected
from lftpipe.store.shard import ChunkReader, DamagedShardError, OtherShardError
from lftpipe.store.windows import rolls


class AbsentShardError(StoreError):
    """A shard of a rolling store is not there: not yet, or no longer."""

    file: str = ""


class Shards:
    """Reads chunks from the shards of one store.

    `expected`: by array and split, what the manifest says of each shard; empty if there is none yet.
    """

    def __init__(self, path: Path, spec: StoreSpec, expected: dict[tuple[str, str], Expected]) -> None:
        self.expected = expected
        self._path, self._storage = path, storage_of(path)
        self._threads: tuple[int, tuple[ThreadPoolExecutor, ThreadPoolExecutor]] | None = None
        self._spec, self._step, self._layouts = spec, spec.sequences_per_shard, spec.arrays
        # The cache's own lock is the interpreter's, so that a fork at any moment is safe.
        self._opened = functools.lru_cache(most_open_files())(self._open)

    @property
    def where(self) -> str:
        """The folder or URL."""
        return self._storage.where

    def num_bytes(self, *arrays: str) -> int:
        """Bytes of all shards of some arrays.

        `*arrays`: their names; one that the store does not have counts as none.
        """
        return sum(int(each.sizes.sum()) for (array, _), each in self.expected.items() if array in arrays)

    def read(
        self,
        layout: ArrayLayout,
        split: str,
        layer: int | None,
        sequences: Sequence[int] | np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Read one chunk for each of some sequences.

        `layout`, `split`, `layer`: which array; the layer is None where the array has none.
        Raises `StoreError` if bytes are not as they were written.
        """

        def one(sequence: int | np.integer, row: np.ndarray) -> None:
            self._read_one(layout, split, layer, int(sequence), row)

        if self._storage.concurrency == 1:
            for sequence, row in zip(sequences, out, strict=True):
                one(sequence, row)
        else:
            list(self._pools()[0].map(one, sequences, out))

    def rows(
        self,
        layout: ArrayLayout,
        split: str,
        layer: int | None,
        count: int,
        sequences: Sequence[int] | np.ndarray | None,
        out: np.ndarray | None,
    ) -> np.ndarray:
        """Read some sequences, or all, into an array that is given or made.

        `layout`, `split`, `layer`: which array; the layer is None where the array has none.
        `sequences`: indices in any order; None for all.
        `out`: c-contiguous; None for a new one.
        """
        wanted = range(count) if sequences is None else sequences
        shape = (len(wanted), *layout.chunk)
        if out is None:
            if count:
                self.check_first(layout, split)
            out = np.empty(shape, layout.dtype)
        elif out.shape != shape or not out.flags.c_contiguous or out.dtype not in (layout.dtype, "float32"):
            raise ValueError(
                f"out is {out.dtype} {out.shape}, not a C-contiguous {layout.dtype} array of shape {shape}"
            )
        for sequence in wanted:
            if not 0 <= sequence < count:
                raise IndexError(f"sequence {sequence} of {count} in {split}")
        self.read(layout, split, layer, wanted, out)
        return out

    def together(self, reads: Iterable[Callable[[], object]]) -> None:
        """Do some reads: at the same time where that is worth it."""
        if self._storage.concurrency == 1:
            for read in reads:
                read()
        else:
            list(self._pools()[1].map(lambda read: read(), reads))

    def _pools(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        """For chunks, and for what waits for chunks; each process has its own."""
        if self._threads is None or self._threads[0] != os.getpid():
            made = ThreadPoolExecutor(self._storage.concurrency), ThreadPoolExecutor(8)
            self._threads = os.getpid(), made
        return self._threads[1]

    def _read_one(
        self, layout: ArrayLayout, split: str, layer: int | None, sequence: int, row: np.ndarray
    ) -> None:
        index, within = divmod(sequence, self._step)
        chunk = layout.chunk_number(layer, within)
        try:
            try:
                _read_chunk(layout, self._opened(layout.name, split, index), chunk, row)
            except DamagedShardError:
                if not self._storage.remote:
                    raise
                # A local file that was replaced stays open; an object that was replaced is opened again.
                _read_chunk(layout, self._open(layout.name, split, index), chunk, row)
                self._opened.cache_clear()
        except (DamagedShardError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and rolls(self._spec, split, layout):
                raise _absent(layout, split, index) from None
            raise _damaged(layout, split, index, error) from None

    def let_go(self) -> None:
        """Close all files, so that those which were dropped meanwhile take no room on the disk."""
        self._opened.cache_clear()

    def check_first(self, layout: ArrayLayout, split: str) -> None:
        """Open the first shard: a manifest alone is no reason to ask for memory.

        Raises `StoreError` if it is not as it was written.
        """
        if rolls(self._spec, split, layout):
            return  # it may be dropped
        try:
            self._opened(layout.name, split, 0)
        except (DamagedShardError, FileNotFoundError) as error:
            raise _damaged(layout, split, 0, error) from None

    def _open(self, array: str, split: str, index: int) -> ChunkReader:
        layout = self._layouts[array]
        file = layout.file(split, index)
        if rolls(self._spec, split, layout):
            newest = newest_record(self._path, file)
            if newest is None or not newest.sequences:
                raise FileNotFoundError(file)
            return ChunkReader(self._storage, file, layout.chunks_per_shard, (newest.bytes, newest.tail))
        expected = self.expected[array, split].of(index) if self.expected else None
        try:
            return ChunkReader(self._storage, file, layout.chunks_per_shard, expected)
        except OtherShardError:
            # Only a store that grew meanwhile may have another: one that begins with the same chunks.
            if (newer := newest_record(self._path, file)) is None:
                raise
            return ChunkReader(self._storage, file, layout.chunks_per_shard, (newer.bytes, newer.tail))


def _damaged(layout: ArrayLayout, split: str, index: int, error: Exception) -> StoreError:
    return StoreError(
        f"{layout.name} of {split}, shard {index}: {error}",
        "undamaged bytes",
        "run `lftpipe verify`, then `lftpipe extract --repair`",
    )


def _absent(layout: ArrayLayout, split: str, index: int) -> AbsentShardError:
    error = AbsentShardError(
        f"{layout.name} of {split}, shard {index}, which this rolling store does not hold now",
        "a shard that is there",
        "train beside `lftpipe extract --rolling`, which makes it; or extract a whole store",
    )
    error.file = layout.file(split, index)
    return error


def _read_chunk(layout: ArrayLayout, shard: ChunkReader, chunk: int, row: np.ndarray) -> None:
    if layout.codec == "int8":
        decode(shard.read(chunk), row)
    elif layout.codec == "blosc":
        _decompress(layout, shard, chunk, row)
    elif row.dtype == layout.dtype:
        shard.read(chunk, row)
    else:
        row[...] = widen(shard.read(chunk, np.empty(layout.chunk, layout.dtype)))


def _decompress(layout: ArrayLayout, shard: ChunkReader, chunk: int, row: np.ndarray) -> None:
    own = row if row.dtype == layout.dtype else np.empty(layout.chunk, layout.dtype)
    try:
        decompress(shard.read(chunk), own)
    except ValueError as error:
        raise DamagedShardError(f"chunk {chunk} of {shard.path} is damaged: {error}") from error
    if own is not row:
        row[...] = widen(own)
