"""Shard files, read chunk by chunk."""

from collections.abc import Iterable

import numpy as np

from lftpipe.objects import Storage
from lftpipe.store.shard import CRC_BYTES, MISSING, DamagedShardError, OtherShardError, crc_of, tail_of


class ChunkReader:
    """One open shard file and its index.

    It holds on to the file it opened, even when a longer one takes that name, and moves no file position:
    threads and forked processes may share it. A chunk's checksum is compared when it is first read: it
    takes as long as the reading does from a warm cache.

    Parameters
    ----------
    expected
        Size and tail of the file that was written; a tail of "" is not compared.

    Raises
    ------
    DamagedShardError
        If the index is not as it was written.
    """

    def __init__(
        self, storage: Storage, path: str, num_chunks: int, expected: tuple[int, str] | None = None
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
        if expected and (expected[0] != self.size or expected[1] not in ("", self.tail)):
            raise OtherShardError(f"{self.path} is not the shard that was written here")
        self._sound = bytearray(num_chunks)
        self._index: list[list[int]] = np.frombuffer(stored, "<u8", 2 * num_chunks).reshape(-1, 2).tolist()

    def read(self, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """One encoded chunk, into a C-contiguous array of just its size or a new array of bytes.

        Parameters
        ----------
        out
            C-contiguous array to read into; a new array of bytes if left out.
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
