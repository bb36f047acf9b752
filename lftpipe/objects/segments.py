"""A log where nothing can be appended to: numbered objects, each made only if it is absent."""

import re
import threading
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from typing_extensions import override

from lftpipe.errors import StoreError
from lftpipe.objects.client import refusals
from lftpipe.objects.lease import Lease
from lftpipe.objects.storage import Storage

_SEGMENT = re.compile(r"journal\.(\d{12})\.jsonl")


class SegmentLog(Storage):
    """The log of a bucket.

    A process that begins it takes the next number; whoever wrote before fails at its next line.
    """

    @property
    @abstractmethod
    def client(self) -> Any:
        """Obstore's."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object."""

    def begin_segments(self, lease: Lease) -> None:
        """Know of none yet."""
        self._lease = lease
        self._segment = -1  # the last one that this process made
        self._log = threading.Lock()

    @override
    def begin_log(self, data: bytes) -> None:
        self._lease.take()
        with self._log:
            older = self._segments()
            if self._segment >= 0 and max(older, default=-1) != self._segment:
                raise self._taken_over()
            self._create(max(older, default=-1) + 1, b"begin\n" + data)
            self._remove(older)

    @override
    def append_log(self, line: bytes) -> None:
        with self._log:
            before = self._segment
            self._create(before + 1, line)
            # Whoever took over has removed them all, in ascending order; then even the next one may be free.
            try:
                self.size(self._name(before))
            except FileNotFoundError:
                self._remove([self._segment])
                raise self._taken_over() from None

    @override
    def read_log(self) -> bytes | None:
        def segment(number: int) -> bytes:
            try:
                return self.read(self._name(number))
            except FileNotFoundError:  # the log was begun anew just now
                return b""

        lines: bytes | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            segments = list(pool.map(segment, self._segments()))
        for data in filter(None, segments):
            first, _, rest = data.partition(b"\n")
            lines = rest if first == b"begin" else (lines or b"") + data
        return lines

    @override
    def remove_log(self) -> None:
        self._remove(self._segments())

    @override
    def close(self) -> None:
        self._lease.release()  # a later log of the same writer goes on from its last object

    def _segments(self) -> list[int]:
        found = (_SEGMENT.fullmatch(name) for name in self.names())
        return sorted(int(match[1]) for match in found if match)

    def _name(self, number: int) -> str:
        return f"journal.{number:012d}.jsonl"

    def _create(self, number: int, data: bytes) -> None:
        import obstore

        try:
            with refusals(self.where):
                obstore.put(self.client, self._name(number), data, mode="create")
        except FileExistsError:
            # A put whose answer was lost is tried again, and meets itself.
            if self.read(self._name(number)) != data:
                raise self._taken_over() from None
        self._segment = number

    def _remove(self, numbers: list[int]) -> None:
        import obstore

        for number in numbers:
            with refusals(self.where):
                obstore.delete(self.client, self._name(number))

    def _taken_over(self) -> StoreError:
        return StoreError(
            f"{self.where} is being written by another process",
            "one writer at a time",
            "wait for it or end it",
        )
