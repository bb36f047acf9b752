"""The errors a user can cause and cure.

Every message is one line in three parts: what was given, what was expected, what to do.
Anything else that is raised is a defect of lftpipe, and is shown with its traceback.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

#: Of errors that are the disk's or the user's rights', not of what a file says.
_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
)

#: Longest reason of a library that a line quotes.
_LONGEST = 300


class LftpipeError(Exception):
    """Base of all errors that the command line prints as one line, with exit status 1."""

    def __init__(self, given: str, expected: str, do: str) -> None:
        # A name or a library's reason may have line ends in it.
        given, expected, do = (" ".join(part.split()) for part in (given, expected, do))
        super().__init__(f"given: {given} / expected: {expected} / do: {do}")
        self.given = given
        self.expected = expected
        self.do = do

    def __reduce__(self) -> tuple[type["LftpipeError"], tuple[str, str, str]]:
        return type(self), (self.given, self.expected, self.do)


class CorpusError(LftpipeError):
    """The text is missing, unreadable, or too little."""


class TeacherError(LftpipeError):
    """The teacher cannot be found, loaded, or used."""


class StoreError(LftpipeError):
    """The store is missing, incomplete, damaged, busy, or of another identity."""


class StoreBusyError(StoreError):
    """Another process writes the store."""


class SettingsError(LftpipeError):
    """A setting, or a combination of settings, makes no sense."""


class RunError(LftpipeError):
    """A training run is missing, damaged, or does not fit what is asked of it."""


class DivergenceError(RunError):
    """The loss or the gradient of a run is no longer finite."""


@contextmanager
def foreign(kind: type[LftpipeError], given: str, expected: str, do: str) -> Iterator[None]:
    """Where a library parses what a user named: whatever it raises becomes one error of ours.

    Parsers, constructors and Rust's panics raise any type at all over a damaged or edited file.

    `given`, `expected`, `do`: its parts; the library's reason stands behind what was given.
    Raises `LftpipeError`: instead of anything but our own errors, a full or locked disk, and too little
    memory.
    """
    try:
        yield
    except (LftpipeError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust; not an Exception
        if not (panic or isinstance(error, Exception)):
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        raise kind(f"{given} ({reason_of(error)})", expected, do) from error


def reason_of(error: BaseException) -> str:
    """A library's reason in one line of bounded length."""
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= _LONGEST else f"{text[:_LONGEST]}…" if text else type(error).__name__
