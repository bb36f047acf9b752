"""Files and folders that a command makes: they get their names at once, when all of them are on the disk."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lftpipe.errors import SettingsError
from lftpipe.files import sync_folder
from lftpipe.outputs.ownership import MARK, has_mark, not_ours
from lftpipe.outputs.staging import staging


@dataclass(frozen=True)
class Staging:
    """Where files are put before they have their names."""

    folder: Path

    def path(self, final: Path) -> Path:
        """Where to write what will be `final`."""
        return self.folder / final.name


@contextmanager
def making(
    record: Path,
    others: Sequence[Path] = (),
    *,
    marks: Sequence[bytes],
    force: bool,
    cure: str = "pass --force",
) -> Iterator[Staging]:
    """Write files that belong together; they get their names when the block ends without an error.

    Parameters
    ----------
    record
        The file that counts: with it the others are there too.
    others
        Files beside it; those that are not written are not made.
    marks
        Texts by which a record of this kind is known, whole or damaged: any of them is enough.
    cure
        What to do instead of naming another `--out`.

    Raises
    ------
    LftpipeError
        If the record exists and `force` is not set, a file is not lftpipe's, or another process makes it.
    """
    _check(record, others, marks, force, cure)
    with staging(record) as folder:
        _check(record, others, marks, force, cure)  # it may have been made while we waited for our turn
        yield Staging(folder)
        staged = [final for final in (*others, record) if (folder / final.name).exists()]
        for final in staged:
            _sync_file(folder / final.name)
        sync_folder(folder)
        for final in staged:
            if final == record:
                sync_folder(record.parent)
            (folder / final.name).replace(final)
        sync_folder(record.parent)


@contextmanager
def making_folder(out: Path) -> Iterator[Path]:
    """Write a folder, which gets its name when the block ends without an error; an older one is replaced.

    Parameters
    ----------
    out
        The folder; whether it may be replaced is for the caller to say (`refuse_foreign_files`).
    """
    out = out.resolve()
    with staging(out) as folder:
        new, old = folder / "new", folder / "old"
        if old.exists():  # a process was killed between the two renames below
            if not out.exists():
                old.rename(out)
            else:
                shutil.rmtree(old)
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            _sync_file(file) if file.is_file() else sync_folder(file)
        sync_folder(new)
        if out.exists() and any(out.iterdir()):
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync_folder(out.parent)


def _check(record: Path, others: Sequence[Path], marks: Sequence[bytes], force: bool, cure: str) -> None:
    known = has_mark(record, marks)
    if record.exists() and not force:
        raise SettingsError(f"{record}, which exists", "a new file", f"{cure} or another --out")
    if record.exists() and not known:
        raise not_ours(record)
    for other in others:
        # A page or picture of an older version has no mark, but lies beside its record.
        if other.exists() and not (has_mark(other, [MARK]) or (known and record.exists())):
            raise not_ours(other)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
