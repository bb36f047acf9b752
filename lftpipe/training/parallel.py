"""Runs that are trained apart: one after the other here, or at the same time in several processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lftpipe.base.executor import Advance, Done, Job, Place, execute, portable
from lftpipe.results.outcomes import TrainedRun
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training.joint import train_runs
from lftpipe.training.validate import Wanted

#: Runs that see the same batches: each batch is read once for them.
Group = Sequence[Wanted]
Task = tuple[int, Group]
Result = list[TrainedRun] | Exception


def train_apart(
    groups: Sequence[Group],
    store: Store,
    teacher: Teacher,
    *,
    workers: int = 1,
    advance: Callable[[int], object] = lambda _: None,
) -> list[TrainedRun]:
    """Train groups of runs, each run with `resolved` settings.

    Parameters
    ----------
    workers
        Processes. Each has a GPU with the device `cuda`, else its part of the threads; a run's numbers are
        those of one process with as many threads.
    advance
        Called after every group, with the number of its runs.

    Returns
    -------
    list of TrainedRun
        Of every run, in the order of the groups: where it is and how it ended.

    Raises
    ------
    LftpipeError
        What a group that failed raised; with several workers, once the others are trained; or if a process
        dies.
    """
    if min(workers, len(groups)) == 1:
        results = []
        for group in groups:
            results += train_runs(list(group), store, teacher)
            advance(len(group))
        return results
    found: dict[int, Result] = {}
    (_, settings, _), *_ = groups[0]
    job = Job[Task, Result](
        tasks=list(enumerate(groups)),
        start=partial(_Trainer, store.path, settings.workspace),
        done=lambda task, result: found.__setitem__(task[0], result),
        advance=advance,
        size=lambda task: len(task[1]),
        place=Place(settings.device, settings.threads),
        most_deaths=1,  # a run goes on only where its settings say so
        cure="the same command goes on (train: with --resume)",
    )
    execute(job, workers=workers)
    runs: list[TrainedRun] = []
    for number in range(len(groups)):
        if isinstance(result := found[number], Exception):
            raise result
        runs += result
    return runs


class _Trainer:
    """Trains groups in a process of its own."""

    def __init__(self, store: Path, workspace: Path, place: Place) -> None:
        self._store, self._place = Store.open(store), place
        self._teacher = open_recorded(record_of(self._store.identity), workspace, store)

    def __call__(self, tasks: Iterable[Task | None], done: Done[Task, Result], advance: Advance) -> None:
        for task in tasks:
            if task is None:
                continue
            here = [(run, replace(one, **self._place._asdict()), block) for run, one, block in task[1]]
            try:
                done(task, train_runs(here, self._store, self._teacher))
            except Exception as error:  # the other groups are trained all the same
                done(task, portable(error))
            advance(len(here))
