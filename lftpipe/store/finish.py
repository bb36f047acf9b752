"""The last steps of a store: is everything as it was written, and the metadata that says so."""

from pathlib import Path
from typing import TYPE_CHECKING

from lftpipe.errors import StoreError
from lftpipe.files import file_digest, write_atomic
from lftpipe.store.journal import on_disk
from lftpipe.store.parsing import Records

if TYPE_CHECKING:
    from lftpipe.store.writer import StoreWriter


def refuse_incomplete(writer: "StoreWriter", records: Records, checked: Records) -> None:
    """Everything that must be there is there, and what an earlier process wrote is what it wrote.

    Parameters
    ----------
    writer
        The open store.
    records
        All shards that count as done.
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
    if bad := _changed_files(writer.path, records, checked):
        writer.forget(bad)
        raise StoreError(
            f"{', '.join(sorted(bad))} changed since they were written",
            "files that nobody touches",
            "run `lftpipe extract --resume`: only these are written again",
        )


def _changed_files(path: Path, records: Records, checked: Records) -> set[str]:
    """Shard files that are not as they were recorded; those that are checked are not read again."""
    inherited = dict(records.items() - checked.items())
    bad = {file for file, record in inherited.items() if file_digest(path / file) != record.digest}
    return bad | (records.keys() - on_disk(path, records).keys())


def write_metadata(path: Path, files: dict[str, bytes]) -> None:
    """Write the Zarr metadata, the root's last: it says whether the store is complete.

    Parameters
    ----------
    path
        The store's folder.
    files
        By path relative to the store, the JSON text.
    """
    for name in sorted(files, key=lambda name: -name.count("/")):
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != files[name]:
            write_atomic(target, files[name])
