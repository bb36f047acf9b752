"""One shard file: chunks, their index, their checksums; written through direct I/O, read chunk by chunk."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import xxhash

from lftpipe.storage import Reads

# --- Shard files: Zarr's ``sharding_indexed`` format, written and read chunk by chunk.
#
# A shard is the chunks' bytes, each followed by its crc32c, and at the end the index: for every chunk in
# row-major order its offset and length (two little-endian uint64; both 2^64 - 1 for a missing chunk), and
# the index's crc32c. This is what zarr-python writes too; doing it here costs one system call a chunk
# instead of copies of the shard.

MISSING = 2**64 - 1
CRC_BYTES = 4

#: Bytes gathered at least for one write past the page cache: many times what a disk's block and a page need.
#: A little more than 8 MiB: two slots of half of that have checksums too.
_GATHERED = 8 * 2**20 + 2**16
_NOTHING = np.empty(0, np.uint8)


class Record(NamedTuple):
    """What is known of a shard file that is safely on disk."""

    sequences: int
    bytes: int
    digest: str  # xxh3-128 of the whole file
    tail: str = ""  # xxh3-64 of its end, which tells it from every other shard; "" of what is no shard


class DamagedShardError(Exception):
    """A shard file is not as it was written."""


class OtherShardError(DamagedShardError):
    """A shard file is whole, but not the one that was written here."""


def tail_of(last_crc: bytes, index: bytes) -> str:
    """Digest of the end of a shard: the crc32c of its last chunk, the index, the index's crc32c.

    Shards of one array have equal indices, but not equal last chunks. All of it is read with the index.
    """
    return xxhash.xxh3_64_hexdigest(last_crc + index)


def partial_file(path: Path, attempt: str) -> Path:
    """Where a shard grows until it is whole: a file of this attempt alone."""
    return path.with_name(f"{path.name}.{attempt}.partial")


def crc_of(data: np.ndarray | bytes) -> bytes:
    """The crc32c of some bytes, as it is stored."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


class Room(NamedTuple):
    """Memory from which some chunks of equal size will be written, with place for the crc32c of each."""

    pages: np.ndarray
    """Bytes, from a page of memory on that stands for a page of the file."""
    start: int
    """Where in them the chunks begin."""
    offset: int
    """Where in the file."""
    num_chunks: int
    stride: int
    """Bytes from chunk to chunk."""

    def values(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The chunks as an array of `(num_chunks, *shape)` to be filled."""
        end = self.start + self.num_chunks * self.stride
        rows = self.pages[self.start : end].reshape(self.num_chunks, self.stride)
        return rows[:, :-CRC_BYTES].view(dtype).reshape(self.num_chunks, *shape)


class ChunkWriter:
    """Appends chunks to a new file next to ``path``; whoever calls `seal` renames it.

    The bytes go past the page cache where the file system allows it: copying them there and waiting for
    the kernel to write them back took a fifth of the processor's time and a third of the disk's speed.
    Such writes need whole pages of memory and of the file, so chunks are made where they will be written
    from: one thread may take rooms for those to come while another fills and writes those before.

    `free`: memory that other writers of the same store let go; this one takes from it and gives back.
    """

    def __init__(
        self, path: Path, num_chunks: int, free: list[np.ndarray] | None = None, attempt: str = "a"
    ) -> None:
        self.path = partial_file(path, attempt)
        self._index = np.full((num_chunks, 2), MISSING, "<u8")
        self._digest = xxhash.xxh3_128()
        self._free = [] if free is None else free
        self._pages, self._taken, self._planned = _NOTHING, 0, 0  # of the room to be taken next
        self._filling, self._filled, self._offset = _NOTHING, 0, 0  # of the chunk to be filled next
        self._fd, self._direct = _create(self.path)

    def room(self, count: int, chunk_bytes: int) -> Room:
        """Memory for some chunks of so many bytes; rooms must be filled in the order they are taken."""
        stride = chunk_bytes + CRC_BYTES
        if self._taken + count * stride > len(self._pages):
            self._taken = self._planned % mmap.PAGESIZE  # what the pages before do not write
            self._pages = _pages(self._taken + count * stride, self._free)
        room = Room(self._pages, self._taken, self._planned, count, stride)
        self._taken += count * stride
        self._planned += count * stride
        return room

    def fill(self, room: Room, within: int, chunk: int) -> None:
        """The room's chunk `within` is there: sum it up as `chunk` of the file, and write what is full."""
        if self._index[chunk, 0] != MISSING:
            raise ValueError(f"chunk {chunk} of {self.path} is put twice")
        self._index[chunk] = self._offset, room.stride
        self._sum(room, within)

    def put(self, chunk: int, data: np.ndarray | bytes) -> None:
        """Append one encoded chunk: a C-contiguous array or bytes. The order of chunks is free."""
        self.fill(self._copy(data), 0, chunk)

    def missing(self, chunks: range) -> int | None:
        """The first of these chunks that was not put."""
        absent = self._index[chunks.start : chunks.stop : chunks.step, 0] == MISSING
        return chunks[int(absent.argmax())] if absent.any() else None

    @property
    def num_chunks(self) -> int:
        """Chunks that the file's index has room for."""
        return len(self._index)

    def order(self) -> list[int]:
        """The chunks that were put, in the order in which they lie in the file."""
        put = np.flatnonzero(self._index[:, 0] != MISSING)
        return put[self._index[put, 0].argsort()].tolist()

    def seal(self, sequences: int) -> Record:
        """Write the index and wait until all is on the disk.

        `sequences`: how many sequences the shard holds; it goes into the record.
        """
        last_crc = self._filling[max(self._filled - CRC_BYTES, 0) : self._filled].tobytes()
        self._sum(self._copy(self._index.tobytes()), 0)
        index = self._filling[self._filled - self._index.nbytes - CRC_BYTES : self._filled].tobytes()
        whole = self._filled - self._filled % mmap.PAGESIZE  # the file need not end with a whole page
        self._write(self._filling[:whole])
        self._through_page_cache()
        self._write(self._filling[whole : self._filled])
        os.fsync(self._fd)
        self._close()
        self._free.append(self._filling)
        return Record(sequences, self._offset, self._digest.hexdigest(), tail_of(last_crc, index))

    def discard(self) -> None:
        """Leave nothing behind."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _copy(self, data: np.ndarray | bytes) -> Room:
        given = np.frombuffer(data, np.uint8)
        room = self.room(1, len(given))
        room.values("uint8", given.shape)[0] = given
        return room

    def _sum(self, room: Room, within: int) -> None:
        assert room.offset + within * room.stride == self._offset, "rooms are filled out of order"
        if room.pages is not self._filling:
            whole = self._filled - self._filled % mmap.PAGESIZE
            self._write(self._filling[:whole])
            room.pages[: self._filled - whole] = self._filling[whole : self._filled]
            self._free.append(self._filling)
            self._filling = room.pages
        self._filled = room.start + (within + 1) * room.stride
        chunk = room.pages[self._filled - room.stride : self._filled]
        chunk[-CRC_BYTES:] = np.frombuffer(crc_of(chunk[:-CRC_BYTES]), np.uint8)
        self._digest.update(chunk.data)
        self._offset += room.stride

    def _write(self, data: np.ndarray) -> None:
        view = data.data
        while view:  # a write may be cut short, by a full disk for one
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._through_page_cache()

    def _through_page_cache(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _pages(num_bytes: int, free: list[np.ndarray]) -> np.ndarray:
    """Memory that begins on a page, as direct writes need it; huge pages take less time to hand over."""
    with suppress(IndexError):  # other threads take from it too
        while True:
            if len(pages := free.pop()) >= num_bytes:
                return pages
    memory = mmap.mmap(-1, max(num_bytes, _GATHERED))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _create(path: Path) -> tuple[int, bool]:
    """A new file's descriptor, and whether it bypasses the page cache, which not all file systems can."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if direct := getattr(os, "O_DIRECT", 0):
        try:
            return os.open(path, flags | direct, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o666), False


# --- Shard files, read chunk by chunk.


class ChunkReader:
    """One open shard file and its index.

    It holds on to the file it opened, even when a longer one takes that name, and moves no file position:
    threads and forked processes may share it. A chunk's checksum is compared when it is first read: it
    takes as long as the reading does from a warm cache.

    `expected`: size and tail of the file that was written.
    Raises `DamagedShardError` if the index is not as it was written.
    """

    def __init__(
        self, storage: Reads, path: str, num_chunks: int, expected: tuple[int, str] | None = None
    ) -> None:
        self.path = f"{storage.where}/{path}"
        index_bytes = 16 * num_chunks
        # The last chunk's checksum is read too.
        self._file = storage.open(path, index_bytes + 2 * CRC_BYTES, expected[0] if expected else None)
        self.size, stored = self._file.size, self._file.end
        last_crc, stored = stored[:CRC_BYTES], stored[CRC_BYTES:]
        if len(stored) != index_bytes + CRC_BYTES or crc_of(stored[:index_bytes]) != stored[index_bytes:]:
            raise DamagedShardError(f"the index of {self.path} is damaged")
        self.tail = tail_of(last_crc, stored)
        if expected and expected != (self.size, self.tail):
            raise OtherShardError(f"{self.path} is not the shard that was written here")
        self._sound = bytearray(num_chunks)
        self._index: list[list[int]] = np.frombuffer(stored, "<u8", 2 * num_chunks).reshape(-1, 2).tolist()

    def read(self, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """One encoded chunk, into a C-contiguous array of just its size or a new array of bytes.

        `out`: c-contiguous array to read into; a new array of bytes if left out.
        """
        start, length = self._index[chunk]
        if start == MISSING:
            raise DamagedShardError(f"chunk {chunk} is missing in {self.path}")
        if out is None:
            out = np.empty(max(length - CRC_BYTES, 0), np.uint8)
        crc = bytearray(CRC_BYTES)
        whole = length == out.nbytes + CRC_BYTES and self._file.read_into([out.data, crc], start) == length
        if not whole or not (self._sound[chunk] or crc_of(out) == crc):
            raise DamagedShardError(f"chunk {chunk} of {self.path} is damaged")
        self._sound[chunk] = True
        return out

    def check(self, chunks: Iterable[int]) -> None:
        """Read these chunks, which must be all there are, and see that no byte of the file is left over."""
        rest = self.size - CRC_BYTES - 16 * len(self._index)
        for chunk in chunks:
            rest -= self.read(chunk).nbytes + CRC_BYTES
        if rest:
            raise DamagedShardError(f"{self.path} has {rest} bytes too many")
