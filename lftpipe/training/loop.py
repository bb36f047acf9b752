"""The training loop: batches in, trained flow layers out, resumable at any checkpoint."""

import io
import math
import pickle
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lftpipe import progress
from lftpipe.batch import Batch, BatchFields
from lftpipe.errors import DivergenceError, RunError
from lftpipe.files import write_atomic
from lftpipe.training import processes, readout
from lftpipe.training.chain import Chain
from lftpipe.training.holdout import HoldOut
from lftpipe.training.live import live_batches
from lftpipe.training.log import Log
from lftpipe.training.run import Training


def train_together(chains: list[Chain], *, resume: bool = False) -> list[dict[str, Any]]:
    """Train runs that share store, batches and seed from one stream of batches, each read once.

    Parameters
    ----------
    chains
        Runs of one flow layer, or of several that are trained jointly.
    resume
        Go on from checkpoints.

    Returns
    -------
    list of dict
        Of every run: where it is and how it ended.

    Raises
    ------
    RunError
        If a checkpoint is damaged, or a run diverges: the others are trained to their ends first.
    """
    for chain in chains:
        if resume:
            _restore(chain)
        for run in chain.runs:
            if run.settings.init == "readout" and run.step == 0:
                readout.refit(run, partial(_first_batches, run))
    labels = ", ".join(run.folder.name for chain in chains for run in chain.runs)
    first = chains[0].runs[0]
    start = min((chain.step for chain in chains if not chain.finished), default=0)
    total = max(chain.num_steps for chain in chains) * first.tokens_per_step
    with (
        ExitStack() as logs,
        progress.task(f"train {labels}", total, "tokens", done=start * first.tokens_per_step) as task,
    ):
        together = [Course(chain, logs) for chain in chains]
        while active := [course for course in together if course.goes_on]:
            step = min(course.chain.step for course in active)
            stop = min(course.chain.stage_end for course in active if course.chain.step == step)
            fields = BatchFields()
            for course in active:
                fields |= course.chain.fields
            for batch, waited in _batches(first, fields, step, stop):
                for course in active:
                    if course.chain.step == batch.step and course.goes_on:
                        course.advance(batch, waited)
                shown = {"loss": f"{first.loss:.4f}", "NMSE": f"{together[0].nmse:.4f}"}
                task.advance(first.tokens_per_step, **shown)
                if not any(course.goes_on for course in active):
                    break
    results = [result for course in together if not course.error for result in course.finish()]
    for course in together:
        if course.error:
            raise course.error
    return results


class Course:
    """A chain on its way: it is advanced, logged, judged and checkpointed."""

    def __init__(self, chain: Chain, logs: ExitStack) -> None:
        self.chain = chain
        self.nmse = float("nan")
        self.error: DivergenceError | None = None
        settings = chain.runs[0].settings
        self._log_every, self._checkpoint_every = settings.log_every, settings.checkpoint_every
        self._evaluate_every = settings.evaluate_every
        self._hold_out = HoldOut(chain) if self._evaluate_every else None
        self._logs = [logs.enter_context(closing(Log(run))) for run in chain.runs]

    @property
    def goes_on(self) -> bool:
        return not self.chain.finished and self.error is None

    def advance(self, batch: Batch, waited: float) -> None:
        """One step of every run of the chain; keeps the error if one of them diverges."""
        chain, started = self.chain, time.monotonic()
        try:
            rates = chain.advance(batch)
        except DivergenceError as error:
            self.error = error
            return
        for run in chain.runs:
            run.waited += waited
            run.seconds += waited + time.monotonic() - started
        step, found = chain.step, {}
        if self._hold_out and (step % self._evaluate_every == 0 or step == chain.num_steps):
            found = self._hold_out.evaluate()
        if found or step % self._log_every == 0 or step == chain.num_steps:
            nmses = chain.nmse(batch)
            self.nmse = nmses[0]
            for log, rate, nmse in zip(self._logs, rates, nmses, strict=True):
                log.write(rate, nmse, found.get(log.run.folder, {}))
        if step % self._checkpoint_every == 0 and not chain.finished:
            for log in self._logs:
                log.flush()
            save_checkpoint(chain)

    def finish(self) -> list[dict[str, Any]]:
        """Write every run's weights and manifest."""
        results = [run.finish() for run in self.chain.runs]
        if processes.rank() == 0:
            self.chain.checkpoint.unlink(missing_ok=True)
        processes.wait()
        return results


def _batches(run: Training, fields: BatchFields, step: int, stop: int) -> Iterator[tuple[Batch, float]]:
    """Batches of steps `step` to `stop - 1`, functions of seed and step, and the seconds waited for each."""
    if run.settings.from_teacher:
        batches = live_batches(run.reader, run.teacher, fields, run.order, step)
    else:
        batches = run.reader.shuffled(fields, run.order, step)
    for _ in range(step, stop):
        before = time.monotonic()
        batch = next(batches)
        yield batch, time.monotonic() - before


def _first_batches(run: Training) -> Iterator[Batch]:
    """What a start in closed form is fitted on."""
    steps = min(math.ceil(readout.TOKENS / run.tokens_per_step), run.num_steps)
    return (batch for batch, _ in _batches(run, BatchFields((run.m, run.n)), 0, steps))


def save_checkpoint(chain: Chain) -> None:
    """All that a killed run needs to go on, in one file for the runs of a chain."""
    if processes.rank() != 0:
        return
    path = chain.checkpoint
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    torch.save([run.state() for run in chain.runs], content)
    write_atomic(path, content.getvalue())


def _restore(chain: Chain) -> None:
    path = chain.checkpoint
    if not path.exists():
        return
    for run, state in zip(chain.runs, _load(path, chain.runs[0].device), strict=True):
        run.restore(state)


def _load(path: Path, device: torch.device) -> list[dict[str, Any]]:
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"damaged {path}", "a checkpoint", "start the run again with --force") from error
