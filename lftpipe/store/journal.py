"""The bookkeeping of a store: the lock, the journal of a store in the making, the manifest of a finished one.

A shard's digest is in the journal *before* the shard gets its name. So a crash between the two leaves a whole
``.partial`` file that the journal knows, and opening the store again gives it its name.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.errors import StoreBusyError, StoreError
from lftpipe.files import canonical, file_digest, read_sealed, write_sealed
from lftpipe.objects import Storage, storage_of
from lftpipe.store.layout import JOURNAL, LOCK, PLAN, StoreSpec
from lftpipe.store.parsing import (
    Records,
    check_committed,
    num_shards,
    parse_records,
    parse_spec,
)
from lftpipe.store.sealed import attempt_of, final_of
from lftpipe.store.shard import Record


class Journal:
    """An append-only file of lines ``digest json``: the specification first, then what was committed."""

    def __init__(self, storage: Storage, spec: StoreSpec, records: Records) -> None:
        """Begin anew with what is known so far, which also drops the torn last line of a killed process."""
        storage.begin_log(line_of(spec.to_json()) + line_of(records))
        self._storage = storage

    def append(self, records: Records) -> None:
        """Add the records of one commit and wait until they are on the disk.

        Parameters
        ----------
        records
            Records of the shards that are being committed.
        """
        self._storage.append_log(line_of(records))

    def close(self) -> None:
        """Close the log; what was appended stays."""
        self._storage.close()

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a store has a journal: it is being made, grown or repaired.

        Parameters
        ----------
        path
            The store's folder.
        """
        return storage_of(path).read_log() is not None

    @staticmethod
    def read(path: Path) -> tuple[StoreSpec, Records] | None:
        """What was planned, and what was committed so far; None without a journal.

        Parameters
        ----------
        path
            The store's folder.

        Raises
        ------
        ValueError
            If its first line is damaged, or a whole line says what no store can mean. Other damaged lines
            count as work not done.
        """
        if (log := storage_of(path).read_log()) is None:
            return None
        header, *lines = log.split(b"\n")
        try:
            spec, records = parse_spec(content_of(header)), {}
            for line in lines:
                records.update(parse_records(content_of(line) or {}))
            check_committed(spec, records)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path / JOURNAL} is damaged: {error}") from None
        return spec, records


def line_of(value: object) -> bytes:
    """A journal's line: a digest, and the JSON text that it is of.

    Parameters
    ----------
    value
        JSON-plain.
    """
    text = canonical(value)
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def content_of(line: bytes) -> Any:
    """What `line_of` wrote; None if it is damaged.

    Parameters
    ----------
    line
        Without its end.
    """
    digest, _, text = line.partition(b" ")
    return json.loads(text) if digest == xxhash.xxh3_64_hexdigest(text).encode() else None


#: How the names of attempts begin that are made by `PartJournal`'s owners.
PART = "p"


def settle(path: Path, records: Records) -> None:
    """Name the journaled shards that a killed process had no time to name; remove what it left unfinished.

    Parameters
    ----------
    path
        The store's folder.
    records
        What the journal knows.
    """
    storage = storage_of(path)
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


def stored_records(path: Path) -> dict[str, int]:
    """Sequences in every shard file of a store in the making, as its journal says it; for who has no lock.

    Parameters
    ----------
    path
        The store's folder.
    """
    try:
        journal = Journal.read(path)
    except ValueError:
        journal = None
    return {file: record.sequences for file, record in journal[1].items()} if journal else {}


def read_plan(path: Path) -> dict[str, Any] | None:
    """What is to be computed, as `write_plan` froze it; None if nothing is, or if it is damaged.

    Parameters
    ----------
    path
        The store's folder.
    """
    try:
        return read_sealed(path / PLAN)
    except (FileNotFoundError, ValueError):
        return None


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Freeze what is to be computed.

    Parameters
    ----------
    path
        The store's folder.
    plan
        JSON-plain values.
    """
    write_sealed(path / PLAN, plan)


def remove_partials(path: Path, attempts: str, kept: set[str] | None = None) -> None:
    """Remove the unfinished files of some attempts.

    Parameters
    ----------
    path
        The store's folder.
    attempts
        How their names begin.
    kept
        Attempts of such a name whose files stay.
    """
    for partial in path.rglob("*.partial"):
        attempt = attempt_of(partial)
        if attempt.startswith(attempts) and attempt not in (kept or ()):
            partial.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Remove what a store in the making has beside its journal.

    Parameters
    ----------
    path
        The store's folder.
    """
    for file in (path / PLAN, *path.glob("part-*"), *path.rglob("*.partial")):
        file.unlink(missing_ok=True)


def on_disk(path: Path, records: Records) -> Records:
    """Those records whose file is there with the right size.

    Parameters
    ----------
    path
        The store's folder.
    records
        What should be there.
    """
    sizes = storage_of(path).sizes(records)
    return {file: record for file, record in records.items() if sizes.get(file) == record.bytes}


def progress(path: Path) -> tuple[int, int] | None:
    """How many shards of a store in the making are done, and of how many; None if none is being made.

    Parameters
    ----------
    path
        The store's folder.
    """
    journal = Journal.read(path)
    if journal is None:
        return None
    spec, records = journal
    states = [array for array in spec.arrays.values() if array.computed]
    step, done = spec.sequences_per_shard, 0
    for split, count in spec.sequences.items():
        # By what is there: a store is begun for as much as is asked for, which may be absurdly much.
        for index in range(min(-(-count // step), len(records))):
            files = (records.get(array.file(split, index)) for array in states)
            whole = min(step, count - index * step)
            done += all(record and record.sequences >= whole for record in files)
    return done, num_shards(spec)


def take_lock(path: Path) -> int:
    """Become the only writer of a store. The kernel lets go of the lock when the process ends, however.

    Parameters
    ----------
    path
        The store's folder.
    """
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
    """Say disk full, read-only and the like as errors the user can cure.

    Parameters
    ----------
    path
        The store's folder.
    """
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


def describe(data: bytes) -> Record:
    """The record of a small file written whole.

    Parameters
    ----------
    data
        Its content.
    """
    return Record(0, len(data), xxhash.xxh3_128_hexdigest(data))
