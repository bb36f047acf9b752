"""How shards become part of a store: staged, checked, renamed, recorded; and by parts of an array job."""

import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lftpipe.base.errors import StoreBusyError, StoreError
from lftpipe.base.files import file_digest, sync_folder
from lftpipe.storage import LocalStorage, Writes, writable_storage_of
from lftpipe.store.layout import LOCK, PLAN, ShardKey, StoreSpec
from lftpipe.store.records import Records, begin_journal, content_of, line_of, parse_records
from lftpipe.store.shard import Record, partial_file

# --- How shards become part of a store: staged, checked, renamed, recorded; leftovers are cleared.

# --- A store's folder on the disk: its lock, and errors that the user can cure.


def take_lock(path: Path) -> int:
    """Become the only writer of a store. The kernel lets go of the lock when the process ends, however."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreBusyError(
            f"{path} is being written by another process", "one writer at a time", "wait for it or end it"
        ) from None
    return lock


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say disk full, read-only and the like as errors the user can cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            do = "free some space, then run `lftpipe extract --resume`: what is committed is kept"
            raise StoreError(f"{path}: {error.strerror}", "room for the whole store", do) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StoreError(
                f"{error.filename or path}: {error.strerror}",
                "a folder that can be written",
                "choose another --store",
            ) from error
        raise


# --- What an attempt at a shard leaves: whole files under names of its own, until the writer takes them.

#: `FILE.partial` is what versions before attempts had names left.
_PARTIAL = re.compile(r"(?P<final>.+?)(\.(?P<attempt>[a-z][\w-]*))?\.partial")


class Sealed(NamedTuple):
    """A shard that is whole and on the disk, but has no names yet. It can be sent to another process."""

    key: ShardKey
    attempt: str
    """Names its files, so that no two attempts at a shard ever write the same one."""
    records: Records

    def partial(self, store: Path, file: str) -> Path:
        """Where one of its files is."""
        return partial_file(store / file, self.attempt)

    def is_there(self, store: Path) -> bool:
        """Whether all of its files are as long as they were written."""
        try:
            sizes = {file: self.partial(store, file).stat().st_size for file in self.records}
        except FileNotFoundError:
            return False
        return sizes == {file: record.bytes for file, record in self.records.items()}

    def name(self, store: Path) -> set[Path]:
        """Give the files their names; the folders that must be synced for it to last."""
        for file in self.records:
            self.partial(store, file).replace(store / file)
        return {(store / file).parent for file in self.records}

    def discard(self, store: Path) -> None:
        """Leave nothing of it behind."""
        for file in self.records:
            self.partial(store, file).unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        """The shard as JSON-plain values, for another process."""
        rows = self.key.sequences
        return {
            "key": [self.key.split, self.key.index, rows.start, rows.stop],
            "attempt": self.attempt,
            "records": {file: list(record) for file, record in self.records.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Sealed":
        """Read what `to_json` gave."""
        split, index, start, stop = value["key"]
        records = parse_records(value["records"])
        return cls(ShardKey(split, index, range(start, stop)), value["attempt"], records)


def final_of(partial: Path) -> Path:
    """The name that a `.partial` file was to get."""
    match = _PARTIAL.fullmatch(partial.name)
    assert match is not None, partial
    return partial.with_name(match["final"])


def attempt_of(partial: Path) -> str:
    """The attempt that wrote a `.partial` file; empty if it is not known."""
    match = _PARTIAL.fullmatch(partial.name)
    assert match is not None, partial
    return match["attempt"] or ""


def sync_folders(folders: set[Path]) -> None:
    """Make the new names in some folders last."""
    for folder in sorted(folders):
        sync_folder(folder)


# --- What killed processes left in a store in the making: shards without their names, unfinished files.

#: How the names of attempts begin that are made by `PartJournal`'s owners.
PART = "p"


def settle(path: Path, records: Records) -> None:
    """Name the journaled shards that a killed process had no time to name; remove what it left unfinished."""
    storage = writable_storage_of(path)
    for partial in sorted(path.rglob("*.partial")):
        final = final_of(partial)
        record = records.get(str(final.relative_to(path)))
        if record and partial.stat().st_size == record.bytes and file_digest(partial) == record.digest:
            partial.replace(final)
        elif not attempt_of(partial).startswith(PART):  # parts are taken, or removed at the end
            partial.unlink()
    if storage.remote:  # whole ones that had no time to be sent away
        left = [str(file.relative_to(path)) for file in path.glob("*/*/c.*")]
        known = [
            file for file in left if file in records and file_digest(path / file) == records[file].digest
        ]
        storage.take(path, known)
        for file in set(left) - set(known):
            (path / file).unlink()


def remove_partials(path: Path, attempts: str, kept: set[str] | None = None) -> None:
    """Remove the unfinished files of some attempts."""
    for partial in path.rglob("*.partial"):
        attempt = attempt_of(partial)
        if attempt.startswith(attempts) and attempt not in (kept or ()):
            partial.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Remove what a store in the making has beside its journal."""
    for file in (path / PLAN, *path.glob("part-*"), *path.rglob("*.partial")):
        file.unlink(missing_ok=True)


# --- What of a store in the making counts as done: its shards' records, and the journal that outlives a kill.


class Ledger:
    """The records of a store's shards; threads may commit at the same time.

    `storage`: its bytes, as the writer has them: a bucket lets one writer in.
    `checked`: those whose bytes need not be read again: this process wrote them, or an earlier one checked
    them.
    `made`: of a rolling store, all that were ever made: one that was dropped must be the same again.
    """

    def __init__(
        self, path: Path, storage: Writes, records: Records, checked: Records, made: Records | None = None
    ) -> None:
        self.records, self.checked, self.made = records, checked, made or {}
        self._path, self._storage = path, storage
        self.is_open = False  # whether shards can be taken: the store is not complete
        self._rolling = False
        self._commits = threading.Lock()

    def begin(self, spec: StoreSpec) -> None:
        """Begin the journal anew, with the records so far."""
        with self._commits:
            if self.is_open:
                self._storage.close()  # it stays ours, also where the new one cannot be begun
            begin_journal(self._storage, spec, {**self.made, **self.records})
            self.is_open = True
            self._rolling = bool(spec.rolling)

    def close(self) -> None:
        """Let go of the journal, which stays as it is."""
        if self.is_open:
            self._storage.close()
            self.is_open = False

    def take(self, *sealed: Sealed) -> int:
        """Take shards that were produced: into the journal first, then by name.

        One that is known already, and one whose files are not there as they were written, are refused:
        they change no byte, and nothing of them remains.

        Raises `StoreError` if the disk is full, or a shard that was dropped is not the same again: those that
        are not taken are gone then.
        """
        assert self.is_open, "a complete store takes no shards"
        with self._commits, disk_errors(self._path):
            taken: dict[ShardKey, Sealed] = {}
            for each in sealed:
                if each.key not in taken and self._wants(each):
                    taken[each.key] = each
                else:
                    each.discard(self._path)
            records = {file: record for each in taken.values() for file, record in each.records.items()}
            try:
                self._compare(records)
                if news := dict(records.items() - self.made.items()):
                    self._storage.append_log(line_of(news))
            except BaseException:
                for each in taken.values():
                    each.discard(self._path)
                raise
            sync_folders({folder for each in taken.values() for folder in each.name(self._path)})
            self._storage.take(self._path, records)
            self.records.update(records)
            self.checked.update(records)
            if self._rolling:
                self.made.update(records)
        return len(taken)

    def _compare(self, records: Records) -> None:
        """A shard that was dropped is the same when it is made again, or runs would see other states."""
        for file, record in records.items():
            before = self.made.get(file)
            if before and before.sequences == record.sequences and before.digest != record.digest:
                raise StoreError(
                    f"{file} of {self._path}, made again with other bytes than before",
                    "the same bytes: same machine, versions, --device and --threads",
                    "go on as the store was begun, or start it and its runs over (--force)",
                )

    def drop(self, files: Iterable[str]) -> None:
        """Delete shard files that can be made again; what they were like is remembered."""
        with self._commits:
            for file in files:
                self._storage.delete(file)
                self.records.pop(file, None)
                self.checked.pop(file, None)

    def _wants(self, sealed: Sealed) -> bool:
        """Whether a file of it is news, and all are there."""
        known = {file: old.sequences for file in sealed.records if (old := self.records.get(file))}
        news = any(known.get(file, 0) < record.sequences for file, record in sealed.records.items())
        return news and sealed.is_there(self._path)

    def forget(self, files: set[str]) -> None:
        """Count these shard files as not written."""
        assert self.is_open, "nothing is pending in a complete store"
        lost = {file: Record(0, 0, "") for file in files}
        with self._commits:
            self.records.update(lost)
            for file in lost:
                self.made.pop(file, None)
            self._storage.append_log(line_of(lost))


# --- What processes that are not the writer have sealed: one journal for each part of the work.

_NAME = re.compile(r"part-(\d+)-of-(\d+)\.jsonl")


class PartJournal:
    """An append-only file of lines ``digest json``, as the store's own journal: the plan first.

    `sealed`: what was sealed, and is still there or was taken into the store since.
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
