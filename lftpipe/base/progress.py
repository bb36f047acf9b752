"""Progress on stderr: a live line in a terminal, a plain line now and then in a log file."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

#: Seconds between plain lines where stderr is no terminal.
PLAIN_INTERVAL = 30.0


class Task:
    """One long step. `advance` it as work is done; extra fields are shown as they are."""

    def __init__(self, label: str, total: int, unit: str, live: Progress | None, done: int) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self._live = live
        self._id = (
            live.add_task(label, total=total, completed=done, rate="", fields="") if live else TaskID(0)
        )
        self._started = self._printed = time.monotonic()

    @property
    def rate(self) -> float:
        """Units a second since the start, without those done before."""
        return (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)

    def advance(self, amount: int, **fields: str) -> None:
        """Count work as done and show it."""
        self.done += amount
        rate = f"{human(self.rate)} {self.unit}/s"
        shown = "  ".join(f"{name} {value}" for name, value in fields.items())
        if self._live:
            self._live.update(self._id, completed=self.done, rate=rate, fields=shown)
        elif speaks() and time.monotonic() - self._printed > PLAIN_INTERVAL:
            self._printed = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            percent = f"{100 * self.done / max(self.total, 1):.0f} %"
            print(f"{self.label}: {percent}, {rate}, {left:.0f} s left  {shown}", file=sys.stderr, flush=True)

    def aim(self, total: int) -> None:
        """Change how many units there are in all."""
        self.total = total
        if self._live:
            self._live.update(self._id, total=total)


def say(line: str) -> None:
    """A line on stderr, above the live one."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def task(label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
    """Show a step of `total` units, `done` of them before; the line goes away when the step is over.

    `done`: units that were done before; they do not count for the rate.
    """
    console = Console(stderr=True, quiet=not speaks())
    if not console.is_terminal:
        yield Task(label, total, unit, None, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=console, transient=True) as live:
        yield Task(label, total, unit, live, done)


def speaks() -> bool:
    """Whether this process is the one to say something: no worker, and of torchrun's processes the first."""
    return multiprocessing.parent_process() is None and not (launched() and os.environ["RANK"] != "0")


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several that find each other.

    One of these variables alone is left by a cluster or a notebook, and means nothing.
    """
    numbers = all(os.environ.get(name, "").isdigit() for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return numbers and bool(os.environ.get("MASTER_ADDR")) and int(os.environ["WORLD_SIZE"]) > 1


def human(number: int | float) -> str:
    """1234567 as '1.2M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def human_bytes(number: int | float) -> str:
    """Bytes in decimal units: '4.6 GB'."""
    text = human(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"
