"""One process at a time writes into a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lftpipe.errors import LftpipeError, RunError

#: The lock file of a folder that one process at a time writes into.
LOCK = ".lock"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if it is not there.

    Parameters
    ----------
    folder
        One of ours; its hidden lock file is removed in the end.
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
