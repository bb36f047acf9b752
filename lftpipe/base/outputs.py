"""What a command makes: staged beside its place and put there at once, replacing nothing of anyone else's.

Files are staged in a hidden folder `.NAME.making` beside the one that counts, the record. Its lock makes
one writer. When all of them are on the disk, they get their names, the record last: until then there is no
result, and what is there of it is no obstacle to the same command. What a killed process left is taken over
by the next one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lftpipe.base.errors import LftpipeError, RunError, SettingsError
from lftpipe.base.files import sync_folder

# --- One process at a time writes into a folder.

#: The lock file of a folder that one process at a time writes into.
LOCK = ".lock"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if it is not there.

    `folder`: one of ours; its hidden lock file is removed in the end.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its owner has just removed the folder too
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise busy(folder) from None
        os.close(descriptor)  # its owner has just removed it: again
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
            if made:
                folder.rmdir()  # where nothing was written: it is empty then, and else stays
        os.close(descriptor)


def busy(path: Path) -> LftpipeError:
    """The error of a second writer."""
    return RunError(
        f"{path}, which another process is making", "one writer at a time", "wait for it or end it"
    )


# --- What in a folder is lftpipe's: its marks, and the refusal of anything else.

#: What every page and picture carries that lftpipe makes.
MARK = b"made by lftpipe"

#: A comment for pages in Markdown and HTML.
COMMENT = f"<!-- {MARK.decode()} -->"

_LOOK_BYTES = 2**22


def refuse_foreign_files(folder: Path, known: set[str], what: str) -> None:
    """Refuse to replace a folder with a file in it that is not among those `known`."""
    for entry in sorted(folder.iterdir()):
        if entry.name not in known:
            raise RunError(f"{entry}, which is not part of {what}", what, "move it, or name another --out")


def refuse_name(name: str, option: str) -> None:
    """Refuse a name of a file or folder that would lead to another folder, or be hidden.

    Raises `SettingsError` if it is empty, begins with a dot, or has a separator or a control character in it.
    """
    if not name or name.startswith(".") or "/" in name or os.sep in name or not name.isprintable():
        raise SettingsError(
            f"{option} {name!r}", "a plain name, without / and not beginning with a dot", "choose another"
        )


def has_mark(path: Path, marks: Sequence[bytes]) -> bool:
    """Whether a file is known by any of some texts; an empty one is, since nothing is lost with it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        data = file.read(_LOOK_BYTES)
    return not data or any(mark in data for mark in marks)


def not_ours(path: Path) -> SettingsError:
    """The error of a file that stands where lftpipe is to write."""
    return SettingsError(
        f"{path}, which lftpipe did not make",
        "a new file, or one to replace",
        "move it, or name another --out",
    )


# --- The hidden folder in which a result is made, beside its place: locked, and known as ours.

_OWNER = "made-by-lftpipe"


@contextmanager
def staging(record: Path) -> Iterator[Path]:
    """The empty folder to make a result in; it is gone when the block ends.

    `record`: what is made: a folder, or the file that counts of several.
    Raises `LftpipeError` if another process makes it, or the folder is not lftpipe's.
    """
    folder = record.parent / f".{record.name}.making"
    missing = [parent for parent in record.parents if not parent.exists()]
    record.parent.mkdir(parents=True, exist_ok=True)
    done = False
    descriptor = _lock_folder(folder)
    try:
        _empty(folder)
        (folder / _OWNER).touch()
        yield folder
        done = True
    finally:
        with suppress(OSError):
            _empty(folder, keep="")
            (folder / _OWNER).unlink()  # last: until then the folder is known as ours
            folder.rmdir()
        os.close(descriptor)
        if not done:
            with suppress(OSError):  # no longer empty
                for parent in missing:
                    parent.rmdir()


def _empty(folder: Path, keep: str = "old") -> None:
    """Remove what a killed process left, but for a folder that it had just moved out of the way."""
    for entry in sorted(folder.iterdir()):
        if entry.name not in (keep, _OWNER):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _lock_folder(folder: Path) -> int:
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        names = {entry.name for entry in folder.iterdir()}
        if names and _OWNER not in names:
            raise not_ours(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise busy(folder.with_name(folder.name.removeprefix(".").removesuffix(".making"))) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has just removed it: again


# --- Files and folders that a command makes: they get their names at once, when all of them are on the disk.


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

    Raises `LftpipeError` if the record exists and `force` is not set, a file is not lftpipe's, or another
    process makes it.

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

    `out`: the folder; whether it may be replaced is for the caller to say (`refuse_foreign_files`).
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
    if record.exists() and not force:
        raise SettingsError(f"{record}, which exists", "a new file", f"{cure} or another --out")
    if record.exists() and not has_mark(record, marks):
        raise not_ours(record)
    for other in others:
        if other.exists() and not has_mark(other, [MARK]):
            raise not_ours(other)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
