"""Several runs of one command: checked against one another, claimed, and trained from the same batches."""

from contextlib import ExitStack
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.base.outputs import one_writer
from lftpipe.config.loss import CLOSED_FORM
from lftpipe.config.settings import TrainSettings
from lftpipe.results.outcomes import TrainedRun
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
    chains: list[Chain] = []
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
        chains.append(Chain([TrainingRun(run, settings, store, teacher, blocks, tails, reader)]))
        reader = chains[0].runs[0].reader
    if distributed.rank() == 0:  # all that could be refused was looked at
        for chain in chains:
            for run in chain.runs:
                begin(run.folder, run.settings, store)
    if chains:
        done = train_together(chains, resume=chains[0].settings.resume)
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
