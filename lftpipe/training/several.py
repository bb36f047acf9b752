"""Several runs of one command: trained from the same batches, or in processes of their own."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.base.executor import Advance, Done, Job, Place, execute, portable
from lftpipe.base.outputs import one_writer
from lftpipe.config.loss import CLOSED_FORM
from lftpipe.config.settings import TrainSettings
from lftpipe.results.outcomes import TrainedRun
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training import distributed
from lftpipe.training.checkpoint import begin, is_finished, refuse_foreign
from lftpipe.training.closed_form import fit_closed_form
from lftpipe.training.log import check_tracker
from lftpipe.training.loop import Learner, train_together
from lftpipe.training.run import TrainingRun
from lftpipe.training.terms import FrozenTails
from lftpipe.training.validate import Wanted

# --- Several runs of one command: checked against one another, claimed, and trained from the same batches.

#: What runs have in common that are trained from the same batches.
_SHARED = ("batch_tokens", "seed", "window", "hold_back", "from_teacher", "resume")


def train_runs(wanted: list[Wanted], store: Store, teacher: Teacher) -> list[TrainedRun]:
    """Train runs with `resolved` settings, or go on with them; finished ones are left as they are.

    Raises `LftpipeError` if they can't be trained together, a folder holds another run, or one diverges.

    Returns
    -------
    list of TrainedRun
        Of every run: where it is and how it ended.
    """
    check_together(wanted)
    _ = store.origin  # as it is now: in the end it is compared with what is there then
    with ExitStack() as locks:
        finished: dict[Path, bool] | None = None
        if distributed.rank() == 0:
            finished = {run: _is_finished(locks, run, settings, store) for run, settings, _ in wanted}
        return _train_locked(wanted, distributed.agree(finished), store, teacher)


def _is_finished(locks: ExitStack, run: Path, settings: TrainSettings, store: Store) -> bool:
    """Be the run's only writer, and say whether it is finished already."""
    check_tracker(settings)
    refuse_foreign(run, settings)
    locks.enter_context(one_writer(run))
    return is_finished(run, settings, store)


def _train_locked(
    wanted: list[Wanted], finished: dict[Path, bool], store: Store, teacher: Teacher
) -> list[TrainedRun]:
    results = {run: _finished(run) for run, done in finished.items() if done}
    learners: list[Learner] = []
    tails, reader = FrozenTails(), None
    for run, settings, blocks in wanted:
        if run in results:
            continue
        torch.manual_seed(settings.seed)
        if settings.objective in CLOSED_FORM:
            first = distributed.rank() == 0
            fitted = fit_closed_form(run, settings, store, teacher, blocks[0]) if first else None
            results[run] = distributed.agree(fitted)
            continue
        learners.append(Learner(TrainingRun(run, settings, store, teacher, blocks, tails, reader)))
        reader = learners[0].run.reader
    if distributed.rank() == 0:  # all that could be refused was looked at
        for learner in learners:
            begin(learner.run.folder, learner.settings, store)
    if learners:
        done = train_together(learners, resume=learners[0].settings.resume)
        results |= {Path(result.run): result for result in done}
    return [results[run] for run, _, _ in wanted]


def _finished(run: Path) -> TrainedRun:
    finished = runs.open_run(run)
    return TrainedRun(
        run=str(run),
        block=list(finished.block),
        objective=finished.objective,
        train_tokens=finished.train_tokens,
        shape=finished.shape,
        already_finished=True,
    )


def check_together(wanted: list[Wanted]) -> None:
    """Refuse runs that can't be trained by one command."""
    (_, first, _), *others = wanted
    for run, settings, _ in others:
        for key in _SHARED:
            if getattr(settings, key) != getattr(first, key):
                raise SettingsError(
                    f"{key} = {getattr(settings, key)} for {run.name}, {getattr(first, key)} for another run",
                    "the same for all runs of one command",
                    "train them one after the other",
                )
    if len({run for run, _, _ in wanted}) < len(wanted):
        raise SettingsError("several runs of the same name", "a name for each", "name them with --run")


# --- Runs that are trained apart: one after the other here, or at the same time in several processes.

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

    `workers`: processes. Each has a GPU with the device `cuda`, else its part of the threads; a run's numbers
    are those of one process with as many threads.
    `advance`: called after every group, with the number of its runs.
    Raises `LftpipeError`: what a group that failed raised; with several workers, once the others are trained;
    or if a process dies.

    Returns
    -------
    list of TrainedRun
        Of every run, in the order of the groups: where it is and how it ended.
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
