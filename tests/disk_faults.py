"""Disk operations that fail, or at which the process dies, one after the other."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import Child

OPERATIONS = ("write", "fsync", "replace", "unlink", "ftruncate", "mkdir")

Act = Callable[[str, tuple[Any, ...]], None]


def before_operation(number: int, act: Act) -> list[int]:
    """Do ``act(name, arguments)`` before the disk operation of this number; how many there were so far."""
    count = [0]

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                act(name, arguments)
            return operation(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))
    return count


@contextmanager
def counted(number: int, act: Act) -> Iterator[list[int]]:
    """`before_operation` within the block only."""
    real = {name: getattr(os, name) for name in OPERATIONS}
    try:
        yield before_operation(number, act)
    finally:
        for name, operation in real.items():
            setattr(os, name, operation)


def disk_full(name: str, arguments: tuple[Any, ...]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_disk(path: Path, size: str) -> bool:
    """Mount a small file system, which only root may."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def killed_after(seconds: float, act: Callable[[], Any], begun: Callable[[], bool] | None = None) -> bool:
    """Whether a process of its own was killed, so many seconds after its start, or after it had begun."""
    child = Child(act)
    while begun is not None and not begun() and child.running:
        time.sleep(0.001)
    time.sleep(seconds)
    status = child.kill(signal.SIGKILL)
    assert status in (0, -signal.SIGKILL), status
    return status != 0
