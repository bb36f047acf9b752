"""The hidden folder in which a result is made, beside its place: locked, and known as ours."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lftpipe.outputs.one_writer import busy
from lftpipe.outputs.ownership import not_ours

_OWNER = "made-by-lftpipe"


@contextmanager
def staging(record: Path) -> Iterator[Path]:
    """The empty folder to make a result in; it is gone when the block ends.

    Parameters
    ----------
    record
        What is made: a folder, or the file that counts of several.

    Raises
    ------
    LftpipeError
        If another process makes it, or the folder is not lftpipe's.
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
