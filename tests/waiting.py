"""To wait for what a thread or a process does, but not for ever."""

import os
import time
from collections.abc import Callable

import pytest


def wait_until(
    happened: Callable[[], object], what: str, *, seconds: float = 60, every: float = 0.01
) -> None:
    """Look until it has happened; fail after so many seconds, and say what did not come."""
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(every)


class Child:
    """A process of its own that does something, forked from this one."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.status: int | None = None
        self.process = os.fork()
        if self.process == 0:
            try:
                act()
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)

    @property
    def running(self) -> bool:
        if self.status is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self, number: int) -> int:
        """Send a signal if it runs, and wait for its end; the exit status."""
        if self.running:
            os.kill(self.process, number)
        return self.join()

    def join(self, seconds: float = 60) -> int:
        """Wait for its end; the exit status, negative if a signal ended it."""
        wait_until(lambda: not self.running, f"the end of process {self.process}", seconds=seconds)
        assert self.status is not None
        return self.status
