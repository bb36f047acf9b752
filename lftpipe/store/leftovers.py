"""What killed processes left in a store in the making: shards without their names, unfinished files."""

from pathlib import Path

from lftpipe.files import file_digest
from lftpipe.objects import storage_of
from lftpipe.store.layout import PLAN
from lftpipe.store.parsing import (
    Records,
)
from lftpipe.store.sealed import attempt_of, final_of

#: How the names of attempts begin that are made by `PartJournal`'s owners.
PART = "p"


def settle(path: Path, records: Records) -> None:
    """Name the journaled shards that a killed process had no time to name; remove what it left unfinished."""
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
