"""What a command says when its stage fails: one line, and the exit status. No torch."""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import typer

from lftpipe.base.errors import LftpipeError
from lftpipe.base.progress import launched, speaks
from lftpipe.cli import interrupt

#: Seconds that a process other than the first of `torchrun` waits before it says why it failed. If the first
#: failed too, torchrun ends this one in that time, and the reason stands there once.
GRACE = 5.0

#: Seconds that any process waits before it says that another one is gone: that one has the reason, and may
#: take long to end on a busy machine.
GRACE_OF_THE_LEFT = 60.0

#: Longest reason that a line quotes.
_LONGEST = 300

#: errno: what to do.
_CURES = {
    errno.ENOSPC: "free space on that disk and run the same command again",
    errno.EDQUOT: "free space in your quota and run the same command again",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EPERM: "give yourself the right to it, or name another place",
    errno.EROFS: "name another place with --workspace or --store",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "name a folder, or a place below one",
    errno.EMFILE: "let a process open more files, `ulimit -n 4096`, and run the same command again",
    errno.ELOOP: "remove the links that point to each other",
}


def guarded(call: Callable[[], None], *, debug: bool, asks_to_resume: bool) -> None:
    """Run a stage; an error becomes one line and an exit status.

    `asks_to_resume`: whether the command goes on after an interrupt only if it is given --resume.
    Raises `typer.Exit` with status 1 after an error, 130 after an interrupt.
    """
    try:
        call()
    except KeyboardInterrupt:
        interrupt.leave_at_once()
        command = "the same command with --resume goes on" if asks_to_resume else "run the same command again"
        fail(f"given: an interrupt / expected: to run to the end / do: {command}", interrupt.STATUS)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        if _is_of_the_exchange(error):
            time.sleep(GRACE_OF_THE_LEFT)
        fail(line_of(error))


def line_of(error: Exception) -> str:
    """An error as given / expected / do."""
    reason = " ".join(str(error).split())[:_LONGEST]
    if isinstance(error, LftpipeError):
        return str(error)
    if isinstance(error, OSError):
        cure = _CURES.get(error.errno or 0, "see what is there, or run again with --debug")
        where = f" at {error.filename}" if error.filename else ""
        return f"given: {error.strerror or reason}{where} / expected: to read and write there / do: {cure}"
    for number in (errno.ENOSPC, errno.EMFILE):  # a library's own type of error, as safetensors has it
        if os.strerror(number) in reason:
            return f"given: {reason} / expected: to read and write there / do: {_CURES[number]}"
    if _is_out_of_memory(error):
        return (
            f"given: {reason or 'a computation'} / expected: enough memory / "
            "do: lower --batch-tokens, --context or --tokens, or use a machine with more memory"
        )
    if _is_of_the_exchange(error):
        return (
            f"given: {type(error).__name__}: {reason} / expected: all processes to go on to the end / "
            "do: see which process failed first, and run again with --resume"
        )
    return (
        f"given: {type(error).__name__}: {reason} / expected: no such thing, a defect of lftpipe / "
        "do: run again with --debug and report what it shows"
    )


def _is_of_the_exchange(error: Exception) -> bool:
    """Whether another process of `torchrun` is gone: torch's own types, or what gloo and NCCL say."""
    text = str(error).lower()
    said = any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset"))
    return launched() and (
        type(error).__module__.startswith("torch") or (isinstance(error, RuntimeError) and said)
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and numpy's MemoryError, and torch's errors of allocators."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text)
    )


def fail(line: str, status: int = 1) -> NoReturn:
    """Print an error's line on stderr and end the command."""
    text = "error: " + " ".join(line.split())
    if not speaks():
        time.sleep(GRACE)
        text = f"process {os.environ['RANK']}: {text}"
    print(text, file=sys.stderr)
    raise typer.Exit(status)
