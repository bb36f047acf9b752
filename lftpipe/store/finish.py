"""The last steps of a store: is everything as it was written, and the metadata that says so."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lftpipe.errors import StoreError
from lftpipe.objects import Storage, storage_of
from lftpipe.store.journal import on_disk
from lftpipe.store.parsing import Records

if TYPE_CHECKING:
    from lftpipe.store.writer import StoreWriter

#: Local files read at the same time: a digest lets other threads run.
_READERS = 4


def refuse_incomplete(writer: "StoreWriter", records: Records, checked: Records) -> None:
    """Everything that must be there is there, and what an earlier process wrote is what it wrote.

    Parameters
    ----------
    checked
        Those whose bytes need not be read again.

    Raises
    ------
    StoreError
        If shards are missing, or have changed: then they are pending again.
    """
    if todo := writer.pending():
        raise StoreError(
            f"{len(todo)} shards of {writer.path} are not written",
            "all of them",
            "run `lftpipe extract --resume`",
        )
    if missing := writer.missing_tokens():
        raise ValueError(f"{missing} was never put")
    refuse_changed(writer, records, checked)


def refuse_changed(writer: "StoreWriter", records: Records, checked: Records) -> None:
    """What an earlier process wrote is what it wrote.

    Parameters
    ----------
    checked
        Those whose bytes need not be read again.

    Raises
    ------
    StoreError
        If shards have changed: then they are pending again.
    """
    if bad := _changed_files(writer.path, records, checked):
        writer.forget(bad)
        raise StoreError(
            f"{', '.join(sorted(bad))} changed since they were written",
            "files that no other program changes",
            "run `lftpipe extract --resume`: only these are written again",
        )


def _changed_files(path: Path, records: Records, checked: Records) -> set[str]:
    """Shard files that are not as they were recorded; those that are checked are not read again."""
    inherited = dict(records.items() - checked.items())
    bad = {file for file, found in digests(storage_of(path), inherited) if found != records[file].digest}
    return bad | (records.keys() - on_disk(path, records).keys())


def digests(storage: Storage, files: Iterable[str]) -> Iterator[tuple[str, str | Exception]]:
    """The digest of each file, or why it has none; some are read at the same time."""

    def read(file: str) -> tuple[str, str | Exception]:
        try:
            return file, storage.digest(file)
        except OSError as error:
            return file, error

    with ThreadPoolExecutor(max(storage.concurrency, _READERS)) as pool:
        yield from pool.map(read, files)


def write_metadata(storage: Storage, files: dict[str, bytes]) -> None:
    """Write the Zarr metadata, the root's last: it says whether the store is complete."""
    for name in sorted(files, key=lambda name: -name.count("/")):
        try:
            same = storage.read(name) == files[name]
        except FileNotFoundError:
            same = False
        if not same:
            storage.write(name, files[name])
