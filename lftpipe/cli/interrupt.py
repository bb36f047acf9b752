"""Ctrl-C: while Python imports, leave at once; in a stage, raise what it can clean up after."""

import os
import signal
import threading
from types import FrameType

LINE = "error: given: an interrupt / expected: to run to the end / do: run the same command again"

#: Exit status of a command that was interrupted, as shells have it.
STATUS = 130


def leave_at_once() -> None:
    """From here on, Ctrl-C ends the process with one line: there is nothing to lose."""
    _replace(_leave)


def raise_in_stage() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt, as Python does from the start."""
    _replace(signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{LINE}\n".encode())
    os._exit(STATUS)


def _replace(handler: "signal._HANDLER") -> None:
    """Set a handler, unless interrupts are ignored (`nohup`) or this is no main thread."""
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, handler)
