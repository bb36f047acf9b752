"""What processes that are not the writer have sealed: one journal for each part of the work."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lftpipe.base.errors import StoreBusyError
from lftpipe.storage import LocalStorage
from lftpipe.store.commit_log import PART, Sealed, disk_errors, remove_partials
from lftpipe.store.layout import ShardKey
from lftpipe.store.records import content_of, line_of

_NAME = re.compile(r"part-(\d+)-of-(\d+)\.jsonl")


class PartJournal:
    """An append-only file of lines ``digest json``, as the store's own journal: the plan first.

    Attributes
    ----------
    sealed
        What was sealed, and is still there or was taken into the store since.
    """

    def __init__(self, path: Path, index: int, count: int, plan: str) -> None:
        self.path, self.index, self.count, self.plan = path, index, count, plan
        self.sealed: dict[ShardKey, Sealed] = {}
        self.notes: dict[str, Any] = {}
        self.done = False
        self._name = f"part-{index}-of-{count}"
        self._log = LocalStorage(path, f"{self._name}.jsonl")
        self._read()

    @property
    def attempts(self) -> str:
        """How the names of this part's files begin."""
        return f"{PART}{self.index}-{self.count}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one process that computes this part; what another left unfinished is removed."""
        lock = os.open(self.path / f"{self._name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusyError(
                    f"part {self.index} of {self.count} of {self.path}, which another process computes",
                    "one process a part",
                    "give each another --part",
                ) from None
            self._read()
            kept = {each.attempt for each in self.sealed.values()}
            remove_partials(self.path, f"{self.attempts}-", kept)
            content = {"sealed": [each.to_json() for each in self.sealed.values()], "notes": self.notes}
            with disk_errors(self.path):
                self._log.begin_log(line_of({"plan": self.plan}) + line_of(content))
            yield
        finally:
            self._log.close()
            os.close(lock)

    def append(self, sealed: Sealed) -> None:
        """Record a shard that is on the disk."""
        self._append({"sealed": [sealed.to_json()]})
        self.sealed[sealed.key] = sealed

    def note(self, **found: Any) -> None:
        """Record what was measured."""
        self._append({"notes": found})
        self.notes |= found

    def finish(self) -> None:
        """Record that the part is whole."""
        self._append({"done": True})
        self.done = True

    def _append(self, content: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._log.append_log(line_of(content))

    def _read(self) -> None:
        header, *lines = (self._log.read_log() or b"").split(b"\n")
        if (content_of(header) or {}).get("plan") != self.plan:
            return  # of another plan: begun anew
        self.sealed, self.notes = {}, {}
        for content in filter(None, map(content_of, lines)):
            for each in map(Sealed.from_json, content.get("sealed", ())):
                self.sealed[each.key] = each
            self.notes |= content.get("notes", {})
            self.done |= content.get("done", False)


def read_parts(path: Path, plan: str) -> list[PartJournal]:
    """The journals of all parts of a plan that were begun."""
    numbers = sorted(
        tuple(map(int, match.groups()))
        for file in path.glob("part-*")
        if (match := _NAME.fullmatch(file.name))
    )
    return [PartJournal(path, index, count, plan) for index, count in numbers]
