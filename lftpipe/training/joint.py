"""Several runs of one command: checked against one another, claimed, and trained from the same batches."""

from contextlib import ExitStack
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.outputs import one_writer
from lftpipe.config.layers import check_apart
from lftpipe.config.loss import CLOSED_FORM
from lftpipe.config.settings import TrainSettings
from lftpipe.results.outcomes import TrainedRun
from lftpipe.results.run import read_metrics
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher
from lftpipe.training import distributed
from lftpipe.training.checkpoint import begin, is_finished, refuse_foreign
from lftpipe.training.closed_form import fit_closed_form
from lftpipe.training.log import check_tracker
from lftpipe.training.loop import Chain, train_together
from lftpipe.training.run import TrainingRun
from lftpipe.training.terms import FrozenTails
from lftpipe.training.validate import Wanted

#: What runs have in common that are trained from the same batches.
_SHARED = ("batch_tokens", "seed", "window", "hold_back", "from_teacher", "resume")


def train_runs(wanted: list[Wanted], store: Store, teacher: Teacher) -> list[TrainedRun]:
    """Train runs with `resolved` settings, or go on with them; finished ones are left as they are.

    Returns
    -------
    list of TrainedRun
        Of every run: where it is and how it ended.

    Raises
    ------
    LftpipeError
        If they can't be trained together, a folder holds another run, or one diverges.
    """
    check_together(wanted)
    _ = store.origin  # as it is now: in the end it is compared with what is there then
    students = _students(wanted)
    with ExitStack() as locks:
        finished: dict[Path, bool] | None = None
        if distributed.rank() == 0:
            finished = {run: _is_finished(locks, run, settings, store) for run, settings, _ in wanted}
            for student in students:
                folders = [run for run, _, _ in student]
                if len(folders) > 1 and _was_killed_at_the_end(folders, [finished[run] for run in folders]):
                    finished |= dict.fromkeys(folders, False)
        return _train_locked(students, distributed.agree(finished), store, teacher)


def _students(wanted: list[Wanted]) -> list[list[Wanted]]:
    """The runs of each student: one each, or with `--joint` those of a variant's blocks."""
    students: list[list[Wanted]] = []
    for one in wanted:
        (_, settings, _), before = one, students[-1][0][1] if students else None
        if before and settings.joint and before.joint and settings.run == before.run:
            students[-1].append(one)
        else:
            students.append([one])
    return students


def _is_finished(locks: ExitStack, run: Path, settings: TrainSettings, store: Store) -> bool:
    """Be the run's only writer, and say whether it is finished already."""
    check_tracker(settings)
    refuse_foreign(run, settings)
    locks.enter_context(one_writer(run))
    return is_finished(run, settings, store)


def _was_killed_at_the_end(folders: list[Path], finished: list[bool]) -> bool:
    """Whether joint runs were all trained to the end, and a kill left the first without its manifest.

    The first run's manifest is written last. If its metrics end where a finished one's training did, the two
    were trained together, and all of them go on from the checkpoint in the first one's folder.
    """
    if finished[0] or not any(finished):
        return False
    rows = read_metrics(folders[0] / runs.METRICS).rows
    done = {_finished(run).train_tokens for run, there in zip(folders, finished, strict=True) if there}
    return bool(rows) and done == {rows[-1]["tokens"]}


def _train_locked(
    students: list[list[Wanted]], finished: dict[Path, bool], store: Store, teacher: Teacher
) -> list[TrainedRun]:
    results = {run: _finished(run) for run, done in finished.items() if done}
    chains: list[Chain] = []
    tails, reader = FrozenTails(), None
    for student in students:
        folders = [run for run, _, _ in student]
        if all(run in results for run in folders):
            continue
        if any(run in results for run in folders):
            raise RunError(
                "runs to be trained jointly, of which some are finished",
                "all or none",
                "name new ones, or --force",
            )
        training: list[TrainingRun] = []
        for run, settings, block in student:
            torch.manual_seed(settings.seed)
            if settings.objective in CLOSED_FORM:
                first = distributed.rank() == 0
                fitted = fit_closed_form(run, settings, store, teacher, block) if first else None
                results[run] = distributed.agree(fitted)
                continue
            training.append(
                TrainingRun(run, settings, store, teacher, block, tails, reader, student=tuple(folders))
            )
            reader = training[0].reader
        if training:
            chains.append(Chain(training))
    if distributed.rank() == 0:  # all that could be refused was looked at
        for chain in chains:
            for run in chain.runs:
                begin(run.folder, run.settings, store)
    if chains:
        done = train_together(chains, resume=chains[0].settings.resume)
        results |= {Path(result.run): result for result in done}
    return [results[run] for student in students for run, _, _ in student]


def _finished(run: Path) -> TrainedRun:
    finished = runs.open_run(run)
    return TrainedRun(
        run=str(run),
        block=list(finished.block),
        objective=finished.objective,
        train_tokens=finished.train_tokens,
        joint=[str(run.parent / name) for name in finished.joint] if finished.joint else None,
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
    for student in _students(wanted):
        if student[0][1].joint:
            _check_student(student)


def _check_student(student: list[Wanted]) -> None:
    """Refuse runs that can't be the flow layers of one student."""
    (_, first, _), *others = student
    check_apart([block for _, _, block in student], "--joint with blocks")
    if first.objective in CLOSED_FORM:
        raise SettingsError(
            f"--joint with --objective {first.objective}", "an objective of steps", "leave out --joint"
        )
    if any(settings.tokens != first.tokens or settings.loss != first.loss for _, settings, _ in others):
        raise SettingsError("--joint with different tokens or losses", "the same", "train them apart")
