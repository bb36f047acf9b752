"""The interface, and a folder of this machine behind it."""

import errno
import os
import shutil
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typing_extensions import override

from lftpipe.base.files import file_digest, write_atomic

LOG = "journal.jsonl"


class Opened(ABC):
    """A file that is open for reading."""

    size: int
    """Bytes."""
    end: bytes
    """Its last bytes, as many as were asked for."""

    @abstractmethod
    def read_into(self, buffers: list[Any], start: int) -> int:
        """Fill some buffers, one after the other; returns how many bytes there were.

        `buffers`: one after the other: writable, of bytes or more.
        """


class Reads(ABC):
    """Files by name, to be read.

    A missing file is a FileNotFoundError; what cannot be reached after some retries a StoreError in one line.

    `concurrency`: how many ranges are worth asking for at the same time.
    """

    where: str
    remote: bool
    concurrency: int

    @abstractmethod
    def open(self, name: str, end_bytes: int, size: int | None = None) -> Opened:
        """Open a file, and read its end with it.

        `end_bytes`: how many bytes of its end to read.
        `size`: how large it should be, if that is known: then it takes one request.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """How large each of these files is; those that are missing are left out."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """The xxh3-128 of a file."""

    @abstractmethod
    def names(self) -> set[str]:
        """Files and folders at the top."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Of all files together."""

    @abstractmethod
    def read_log(self) -> bytes | None:
        """All lines of the log; None without one."""


class Writes(Reads):
    """Files by name. What is written is there whole or not at all, and never changes but by `write`."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file: readers see the old one or the new one."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, or all that is in a folder; nothing if it is missing."""

    @abstractmethod
    def take(self, folder: Path, names: Iterable[str]) -> None:
        """Files that are whole lie in a folder of this machine under their names: they belong here now."""

    @abstractmethod
    def begin_log(self, data: bytes) -> None:
        """Begin the log anew with these lines."""

    @abstractmethod
    def append_log(self, line: bytes) -> None:
        """Add a line to the log that was begun; it is there for good when this returns."""

    @abstractmethod
    def remove_log(self) -> None:
        """Remove the log, if there is one."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the log."""


class LocalStorage(Writes):
    """A folder of this machine."""

    def __init__(self, folder: Path, log: str = LOG) -> None:
        self._log_name = log
        self.folder, self.where, self.remote, self.concurrency = folder, str(folder), False, 1
        self._log = -1

    @override
    def open(self, name: str, end_bytes: int, size: int | None = None) -> Opened:
        return _LocalFile(self.folder / name, end_bytes)

    @override
    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    @override
    def write(self, name: str, data: bytes) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)

    @override
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return dict(self._sizes(names))

    def _sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        for name in names:
            try:
                yield name, (self.folder / name).stat().st_size
            except FileNotFoundError:
                continue

    @override
    def digest(self, name: str) -> str:
        return file_digest(self.folder / name)

    @override
    def names(self) -> set[str]:
        return {entry.name for entry in self.folder.iterdir()} if self.folder.is_dir() else set()

    @override
    def delete(self, name: str) -> None:
        target = self.folder / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    @override
    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @override
    def take(self, folder: Path, names: Iterable[str]) -> None:
        pass  # they are here

    @override
    def begin_log(self, data: bytes) -> None:
        self.close()
        write_atomic(self.folder / self._log_name, data)
        self._log = os.open(self.folder / self._log_name, os.O_WRONLY | os.O_APPEND)

    @override
    def append_log(self, line: bytes) -> None:
        end = os.fstat(self._log).st_size
        try:
            if os.write(self._log, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._log)
        except OSError:
            os.ftruncate(self._log, end)
            raise

    @override
    def read_log(self) -> bytes | None:
        try:
            return self.read(self._log_name)
        except FileNotFoundError:
            return None

    @override
    def remove_log(self) -> None:
        (self.folder / self._log_name).unlink(missing_ok=True)

    @override
    def close(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1


class _LocalFile(Opened):
    """It holds on to the file, even when another takes its name, and moves no file position."""

    def __init__(self, path: Path, end_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        start = self.size - end_bytes
        self.end = os.pread(self._fd, end_bytes, start) if start >= 0 else b""

    def read_into(self, buffers: list[Any], start: int) -> int:
        return os.preadv(self._fd, buffers, start)
