"""Ranges of objects kept on this machine's disk, at most so many bytes, the longest unused dropped first."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import xxhash

_DIGEST_BYTES = 8


class RangeCache:
    """Files named by what they hold, in one folder that processes may share.

    Each begins with a digest: a damaged one counts as none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._bytes: int | None = None  # known once something is put
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["RangeCache"], tuple[Path, int]]:
        return RangeCache, (self.folder, self.max_bytes)

    def get(self, place: str) -> Any:
        """The bytes kept for a place; None if there are none."""
        path = self._path(place)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        found = memoryview(data)[_DIGEST_BYTES:]
        return found if xxhash.xxh3_64_digest(found) == data[:_DIGEST_BYTES] else None

    def put(self, place: str, data: Any) -> None:
        """Keep bytes; a disk that is full is no error."""
        path, size = self._path(place), len(data) + _DIGEST_BYTES
        if size > self.max_bytes:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        with self._lock, contextlib.suppress(OSError):
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(xxhash.xxh3_64_digest(data))
                    file.write(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._bytes = (self._bytes or 0) + size

    def _path(self, place: str) -> Path:
        digest = xxhash.xxh3_128_hexdigest(place.encode())
        return self.folder / digest[:2] / digest[2:]

    def _make_room(self, size: int) -> None:
        if self._bytes is not None and self._bytes + size <= self.max_bytes:
            return
        # Another process may have put and dropped some: look again.
        kept = []
        for file in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                found = file.stat()
                kept.append((found.st_mtime_ns, found.st_size, file))
        total = sum(found for _, found, _ in kept)
        for _, found, file in sorted(kept) if total + size > self.max_bytes else ():
            if total + size <= self.max_bytes * 9 // 10:
                break
            file.unlink(missing_ok=True)
            total -= found
        self._bytes = total
