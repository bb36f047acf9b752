"""Runs that are trained apart: one after the other here, or at the same time in several processes."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from lftpipe.base import executor
from lftpipe.base.device import prepare
from lftpipe.base.errors import LftpipeError, RunError
from lftpipe.results.outcomes import TrainedRun
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training.joint import train_runs
from lftpipe.training.validate import Wanted

#: Runs that see the same batches: each batch is read once for them.
Group = Sequence[Wanted]


def train_apart(
    groups: Sequence[Group],
    store: Store,
    teacher: Teacher,
    *,
    workers: int = 1,
    done: Callable[[], object] = lambda: None,
) -> list[TrainedRun]:
    """Train groups of runs, each run with `resolved` settings.

    Parameters
    ----------
    workers
        Processes. Each has a GPU with the device `cuda`, else its part of the threads; a run's numbers are
        those of one process with as many threads.

    Returns
    -------
    list of TrainedRun
        Of every run, in the order of the groups: where it is and how it ended.

    Raises
    ------
    LftpipeError
        What the first group that failed raised, once the others are trained; or if a process dies.
    """
    if workers > 1 and len(groups) > 1:
        with _Crew(groups, store, min(workers, len(groups)), done) as crew:
            return crew.run()
    results = []
    for group in groups:
        results += train_runs(list(group), store, teacher)
        done()
    return results


class _Crew:
    """The processes, and the groups that none of them has."""

    def __init__(self, groups: Sequence[Group], store: Store, count: int, done: Callable[[], object]) -> None:
        self._groups, self._done = groups, done
        self._todo = deque(range(len(groups)))
        self._results: list[list[TrainedRun]] = [[] for _ in groups]
        self._error: Exception | None = None
        self._crew = [self._start(store, number, count) for number in range(count)]

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._crew:
            process.kill()
            process.join()
            connection.close()

    def run(self) -> list[TrainedRun]:
        """Until all groups were trained, or tried."""
        busy = {connection: process for process, connection in self._crew if self._give(connection)}
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                self._hear(connection, busy[connection])
                if not self._give(connection):
                    del busy[connection]
        if self._error:
            raise self._error
        return [result for results in self._results for result in results]

    def _start(self, store: Store, number: int, count: int) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        settings = self._groups[0][0][1]
        place = executor.place_of(settings.device, settings.threads, number, count)
        process = context.Process(
            target=_work, args=(theirs, store.path, *place), name=f"lftpipe-train-{number}", daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def _give(self, connection: Connection) -> bool:
        """The next group to a process; False if there is none."""
        if not self._todo:
            return False
        number = self._todo.popleft()
        with suppress(OSError):  # it has died, which is heard
            connection.send((number, self._groups[number]))
        return True

    def _hear(self, connection: Connection, process: BaseProcess) -> None:
        try:
            number, found = connection.recv()
        except (EOFError, OSError):
            process.join()
            raise RunError(
                f"a process that trained runs and died with exit code {process.exitcode}",
                "processes that live",
                "look for what kills it (memory?); the same command goes on (train: with --resume)",
            ) from None
        if isinstance(found, Exception):
            self._error = self._error or found
        else:
            self._results[number] = found
        self._done()


def _work(connection: Connection, store_path: Path, device: str, threads: int | None) -> None:
    """A process: train what it is given, until it is ended."""
    executor.begin()
    prepare(device, threads)
    store = Store.open(store_path)
    with suppress(EOFError, BrokenPipeError):
        while True:
            number, group = connection.recv()
            here = [(run, replace(one, device=device, threads=threads), block) for run, one, block in group]
            try:
                workspace = here[0][1].workspace
                teacher = open_recorded(record_of(store.identity), workspace, store.path)
                connection.send((number, train_runs(here, store, teacher)))
            except LftpipeError as error:
                connection.send((number, error))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                connection.send(
                    (number, RuntimeError(f"{reason} (in a process; --workers 1 --debug shows where)"))
                )
