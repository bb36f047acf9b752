"""A store's folder on the disk: its lock, and errors that the user can cure."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lftpipe.errors import StoreBusyError, StoreError
from lftpipe.store.layout import LOCK


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
