"""Tasks in this process and in others: each is done once, whoever dies; errors end the job."""

import os
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lftpipe.base.errors import LftpipeError, RunError
from lftpipe.base.executor import Advance, Done, Job, Place, Worker, execute


def square_numbers(folder: Path, place: Place) -> Worker[int, int]:
    """A negative task dies where it is done, the first time; 13 is refused."""

    def work(tasks: Iterable[int | None], done: Done[int, int], advance: Advance) -> None:
        for task in tasks:
            if task is None:
                continue
            advance(1)
            marker = folder / str(task)
            if task < 0 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if task == 13:
                raise RunError("13", "a lucky number", "leave it out")
            done(task, task**2)

    return work


def job(folder: Path, tasks: list[int], **changes: Any) -> tuple[Job[int, int], dict[int, int], list[int]]:
    found: dict[int, int] = {}
    advanced: list[int] = []
    given: dict[str, Any] = {
        "tasks": tasks,
        "start": partial(square_numbers, folder),
        "done": found.__setitem__,
        "advance": advanced.append,
        "size": lambda _: 1,
        "place": Place("cpu", 2),
    }
    return Job(**given | changes), found, advanced


def test_here_every_task_is_done(tmp_path):
    made, found, advanced = job(tmp_path, [1, 2, 3])
    execute(made)
    assert (found, sum(advanced)) == ({1: 1, 2: 4, 3: 9}, 3)


@pytest.mark.slow
def test_what_a_dead_process_had_goes_to_another(tmp_path):
    made, found, advanced = job(tmp_path, [1, -2, 3, 4])
    execute(made, workers=2)
    assert (found, sum(advanced)) == ({1: 1, -2: 4, 3: 9, 4: 16}, 4)


def test_processes_that_die_in_a_row_end_the_job(tmp_path):
    made, _, _ = job(tmp_path, [-1, -2], most_deaths=1, cure="it goes on")
    with pytest.raises(LftpipeError, match=r"died with exit code -9 / .* it goes on"):
        execute(made, workers=2)


def test_an_error_of_a_task_is_raised_here(tmp_path):
    made, _, _ = job(tmp_path, [13, 1])
    with pytest.raises(RunError, match="a lucky number"):
        execute(made, workers=2)


def test_processes_share_the_threads_of_the_command():
    assert Place("cpu", 5).of_worker(1, 2) == Place("cpu", 2)
    assert Place("cpu", 1).of_worker(0, 2) == Place("cpu", 1)
