"""Several runs of one command: checked against one another, claimed, and trained from the same batches."""

from contextlib import ExitStack
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.artefacts.metrics import read_metrics
from lftpipe.artefacts.outcomes.pipeline import TrainedRun
from lftpipe.config.layers import check_apart
from lftpipe.config.objectives import CLOSED_FORM
from lftpipe.config.settings import TrainSettings
from lftpipe.errors import RunError, SettingsError
from lftpipe.outputs import one_writer
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher
from lftpipe.training import processes
from lftpipe.training.closed_form import fit_closed_form
from lftpipe.training.logit_terms import FrozenTails
from lftpipe.training.loop import Chain, train_together
from lftpipe.training.resolve import Wanted
from lftpipe.training.resume import claim, refuse_foreign
from lftpipe.training.run import TrainingRun
from lftpipe.training.trackers import check_tracker

#: What runs have in common that are trained from the same batches.
_SHARED = ("batch_tokens", "seed", "window", "hold_back", "from_teacher", "resume", "device")


def train_runs(
    wanted: list[Wanted], store: Store, teacher: Teacher, *, joint: bool = False
) -> list[TrainedRun]:
    """Train runs with `resolved` settings, or go on with them; finished ones are left as they are.

    Parameters
    ----------
    wanted
        The runs.
    store
        What they are trained on.
    teacher
        The store's.
    joint
        Whether their flow layers are one student's, each beginning where the one before it ends.

    Returns
    -------
    list of TrainedRun
        Of every run: where it is and how it ended.

    Raises
    ------
    LftpipeError
        If they can't be trained together, a folder holds another run, or one diverges.
    """
    check_together(wanted, joint)
    _ = store.origin  # as it is now: in the end it is compared with what is there then
    with ExitStack() as locks:
        claimed = None
        if processes.rank() == 0:
            claimed = [_claim(locks, run, settings, store) for run, settings, _ in wanted]
            if joint and _was_killed_at_the_end([run for run, _, _ in wanted], claimed):
                for run, _, _ in wanted:
                    (run / runs.MANIFEST).unlink(missing_ok=True)
                claimed = [False] * len(wanted)
        return _train_claimed(wanted, processes.agree(claimed), store, teacher, joint=joint)


def _claim(locks: ExitStack, run: Path, settings: TrainSettings, store: Store) -> bool:
    """Be the run's only writer, and say whether it is finished already."""
    check_tracker(settings)
    refuse_foreign(run, settings)
    locks.enter_context(one_writer(run))
    return claim(run, settings, store)


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


def _train_claimed(
    wanted: list[Wanted], finished: list[bool], store: Store, teacher: Teacher, *, joint: bool
) -> list[TrainedRun]:
    if joint and any(finished) and not all(finished):
        raise RunError(
            "runs to be trained jointly, of which some are finished",
            "all or none",
            "name new ones, or --force",
        )
    results = {run: _finished(run) for (run, _, _), done in zip(wanted, finished, strict=True) if done}
    training, tails, reader = [], FrozenTails(), None
    for run, settings, block in wanted:
        if run in results:
            continue
        torch.manual_seed(settings.seed)
        if settings.objective in CLOSED_FORM:
            first = processes.rank() == 0
            fitted = fit_closed_form(run, settings, store, teacher, block) if first else None
            results[run] = processes.agree(fitted)
        else:
            followed = joint and run != wanted[-1][0]
            training.append(
                TrainingRun(run, settings, store, teacher, block, tails, reader, followed=followed)
            )
            reader = training[0].reader
    if training:
        chains = [Chain(training)] if joint else [Chain([each]) for each in training]
        done = train_together(chains, resume=training[0].settings.resume)
        results |= {Path(result.run): result for result in done}
    return [results[run] for run, _, _ in wanted]


def _finished(run: Path) -> TrainedRun:
    finished = runs.open_run(run)
    return TrainedRun(
        run=str(run),
        block=list(finished.block),
        objective=finished.objective,
        train_tokens=finished.train_tokens,
        already_finished=True,
    )


def check_together(wanted: list[Wanted], joint: bool) -> None:
    """Refuse runs that can't be trained by one command.

    Parameters
    ----------
    wanted
        The runs.
    joint
        Whether they are to be one student.

    Raises
    ------
    SettingsError
        With the reason.
    """
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
    blocks = [block for _, _, block in wanted]
    if joint:
        check_apart(blocks, "--joint with blocks")
    if joint and first.objective in CLOSED_FORM:
        raise SettingsError(
            f"--joint with --objective {first.objective}", "an objective of steps", "leave out --joint"
        )
    if joint and any(
        settings.tokens != first.tokens or settings.loss != first.loss for _, settings, _ in others
    ):
        raise SettingsError("--joint with different tokens or losses", "the same", "train them apart")
