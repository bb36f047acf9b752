"""The training loop: batches in, trained layers out, resumable, judged on held-back sequences."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lftpipe.base import progress
from lftpipe.base.errors import DivergenceError
from lftpipe.data.batches import Batch, BatchFields
from lftpipe.results.outcomes import TrainedRun
from lftpipe.teacher.tail import Layers, load_bridges
from lftpipe.training import distributed, starts
from lftpipe.training.averaging import WeightAverage
from lftpipe.training.checkpoint import Checkpoint, is_due
from lftpipe.training.divergence import look_every
from lftpipe.training.log import Log
from lftpipe.training.rolling import Standing
from lftpipe.training.run import TrainedPart, TrainingRun
from lftpipe.training.step import Run, losses_of, nmse_of, squares_of, take_step

# --- Evaluations during training: on sequences kept back from it, and, only to be logged, on validation.


class HoldOut:
    """Sequences of the end of the training split, and the first of validation.

    Only what is held back decides anything: which weights are best, and when to stop.

    `bridges`: the teacher's layers from each block to the next one.
    """

    def __init__(self, joint: Sequence[Run], bridges: Sequence[Layers]) -> None:
        self.runs, self.bridges = joint, bridges
        first = joint[0]
        store, used, most = first.store, first.order.num_sequences, first.sequences_held_back
        validation = store.num_sequences("validation") if first.predicts_states else 0
        self._sequences = {
            "train": range(used, store.num_sequences("train"))[:most],
            "validation": range(validation)[:most],
        }

    def evaluate(self) -> dict[Path, dict[str, float]]:
        """By run's folder: `held_back_loss`, `held_back_nmse`, `validation_nmse`.

        The runs are one student, whose best moment is that of the sum of their losses.
        """
        started = time.monotonic()
        figures: dict[Path, dict[str, float]] = {run.folder: {} for run in self.runs}
        with ExitStack() as shown:
            for run in self.runs:
                shown.enter_context(run.weights.shown())
            for split, key in (("train", "held_back"), ("validation", "validation")):
                if self._sequences[split]:
                    self._evaluate_split(split, key, figures)
        losses = [figures[run.folder].get("held_back_loss", math.nan) for run in self.runs]
        for run in self.runs:
            if not math.isnan(losses[0]):
                run.judge(sum(losses))
            run.seconds += time.monotonic() - started
        return figures

    @torch.no_grad()
    def _evaluate_split(self, split: str, key: str, figures: dict[Path, dict[str, float]]) -> None:
        losses = [0.0] * len(self.runs)
        squares: list[Tensor] = []
        for batch in self._batches(split):
            here = squares_of(self.runs, self.bridges, batch)
            squares = [a + b for a, b in zip(squares, here, strict=True)] if squares else here
            if key == "held_back":
                for i, loss in enumerate(losses_of(self.runs, self.bridges, batch)):
                    losses[i] += loss.item() * len(batch)
        for run, loss, sums in zip(self.runs, losses, squares, strict=True):
            figures[run.folder][f"{key}_nmse"] = nmse_of(sums)
            if key == "held_back":
                figures[run.folder]["held_back_loss"] = loss / len(self._sequences[split])

    def _batches(self, split: str) -> Iterator[Batch]:
        """The same each time: the step, of which the random draws are a function, is the batch's number."""
        first, sequences = self.runs[0], self._sequences[split]
        fields = BatchFields()
        for run in self.runs:
            fields |= run.fields
        for number, start in enumerate(range(sequences.start, sequences.stop, first.order.batch_size)):
            part = range(start, min(start + first.order.batch_size, sequences.stop))
            yield first.reader.read(split, part, fields, number)


# --- The training loop: batches in, trained flow layers out, resumable at any checkpoint.


class Chain:
    """Flow layers of one student that are trained jointly: each begins where the one before it ends.

    Most often it is a single one. With several, the second block's `x_0` is not the teacher's `h[m]` but what
    comes of the first one's prediction, through the teacher's layers between the two; the sum of their losses
    is minimised.

    `joint`: the runs, in the order of their blocks, which do not overlap.
    `error`: why the chain stopped before its end, if it did.
    """

    def __init__(self, joint: Sequence[Run]) -> None:
        self.runs, first = joint, joint[0]
        for run, one in _fitted(joint):
            starts.last_maps(run, one)  # refused before anything is written
        self.bridges = load_bridges(first.teacher, [run.block for run in joint], first.device)
        self.settings = first.settings
        self.nmse = math.nan
        self.error: DivergenceError | None = None
        self._hold_out = HoldOut(joint, self.bridges) if self.settings.evaluate_every else None
        self._standing = _standing_of(first)
        self._checkpoint = Checkpoint(joint, self._standing.passed if self._standing else lambda _: None)
        self._logs: list[Log] = []
        self._look_every = look_every(first.device)
        self._saved = time.monotonic()
        self._joined = -1

    @property
    def step(self) -> int:
        """Steps done."""
        return self.runs[0].step

    @property
    def num_steps(self) -> int:
        """Steps to do in all."""
        return self.runs[0].num_steps

    @property
    def finished(self) -> bool:
        """Whether a run is at its end."""
        return any(run.finished for run in self.runs)

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to do."""
        return not self.finished and self.error is None

    @property
    def stage_end(self) -> int:
        """The step before which batches hold the same fields."""
        return min(run.stage_end for run in self.runs)

    @property
    def fields(self) -> BatchFields:
        """What the present stages of its runs look at."""
        fields = BatchFields()
        for run in self.runs:
            fields |= run.fields
        return fields

    def begin(self, files: ExitStack, *, resume: bool) -> None:
        """Fit or restore what the first step starts from, and open the logs.

        `files`: closes them, and waits for a checkpoint that is being written.
        `resume`: whether to go on from a checkpoint, if there is one.
        """
        files.callback(self._checkpoint.wait)
        if resume:
            self._checkpoint.restore()
        if self._standing and distributed.rank() == 0 and not self.finished:
            self._standing.passed(self.step)
        for run, one in _fitted(self.runs):
            if run.step == 0:
                starts.refit(run, one, partial(_first_batches, run, one.part.block))
        for begun in self.runs:
            if isinstance(begun, TrainingRun) and begun.step == 0:
                for one in begun.narrow:
                    starts.fit(begun, one, partial(_first_batches_of, begun))
        self._logs = [files.enter_context(closing(Log(run))) for run in self.runs]
        if self.step == 0 and self._hold_out and self.runs[0].starts_trained:
            figures = self._hold_out.evaluate()
            for log in self._logs:
                log.write(0.0, math.nan, figures[log.run.folder])

    def join(self) -> None:
        """Let the parts of a student follow one another, where they learned alone until now.

        A checkpoint at this step is from before it.
        """
        if self._joined == self.step:
            return
        self._joined = self.step
        for run in self.runs:
            if isinstance(run, TrainingRun) and run.was_local:
                starts.follow(run, partial(_first_batches_of, run))
                run.weights = WeightAverage(run.module, run.settings.ema)

    def advance(self, batch: Batch, waited: float) -> None:
        """One step of every run, logged, judged and saved where it is time to.

        The error is kept if a run diverges: others may go on.
        """
        started, look = time.monotonic(), self._is_time_to_look()
        try:
            rates = take_step(self.runs, self.bridges, batch, look=look)
        except DivergenceError as error:
            self.error = error
            self._leave()
            return
        for run in self.runs:
            run.waited += waited
            run.seconds += waited + time.monotonic() - started
        figures = (
            self._hold_out.evaluate()
            if self._hold_out and self._is_time(self.settings.evaluate_every)
            else {}
        )
        if figures or self._is_time(self.settings.log_every):
            self._write(batch, rates, figures)
        if look and self._is_time_to_save() and not self.finished:
            for log in self._logs:
                log.flush()
            self._checkpoint.save()
            self._saved = time.monotonic()
        if self.finished:
            self._leave()

    def _leave(self) -> None:
        """A rolling store need keep nothing for these runs."""
        self._checkpoint.wait()
        if self._standing and distributed.rank() == 0:
            self._standing.leave()

    def _enters_window(self, step: int) -> bool:
        return self._standing is not None and self._standing.enters_window(step)

    def _is_time(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _is_time_to_save(self) -> bool:
        """By steps, or by the clock of the process that writes; the others don't ask theirs."""
        return is_due(self.settings, self.step, self._saved) or self._enters_window(self.step)

    def _is_time_to_look(self) -> bool:
        """Whether the next step's weights may be logged, judged or saved, or nobody has looked for long."""
        settings, step = self.settings, self.step + 1
        every = (settings.log_every, settings.checkpoint_every, settings.evaluate_every, self._look_every)
        by_step = step == self.num_steps or any(step % period == 0 for period in every if period)
        return by_step or self._enters_window(step)

    def _write(self, batch: Batch, rates: list[float], figures: dict[Any, dict[str, float]]) -> None:
        nmses = [nmse_of(each) for each in squares_of(self.runs, self.bridges, batch)]
        self.nmse = nmses[0]
        for log, rate, nmse in zip(self._logs, rates, nmses, strict=True):
            log.write(rate, nmse, figures.get(log.run.folder, {}))

    def finish(self) -> list[TrainedRun]:
        """Write every run's weights and manifest, the first run's last: until then the chain goes on."""
        results = [run.finish() for run in reversed(self.runs)][::-1]
        self._checkpoint.drop()
        distributed.wait()
        return results


def _fitted(joint: Sequence[Run]) -> list[tuple[TrainingRun, TrainedPart]]:
    """The parts that start in closed form, each with its run."""
    fitted = [run for run in joint if isinstance(run, TrainingRun) and run.settings.init == "readout"]
    return [(run, one) for run in fitted for one in run.parts]


def _standing_of(run: Run) -> Standing | None:
    """For the producer of a rolling store, if a run reads its states."""
    if not run.store.spec.rolling or not isinstance(run, TrainingRun) or run.settings.from_teacher:
        return None
    return Standing(run.folder, run.store, run.order.batch_size, run.num_steps)


def train_together(chains: list[Chain], *, resume: bool = False, verb: str = "train") -> list[TrainedRun]:
    """Train chains that share store, batches and seed from one stream of batches, each read once.

    `chains`: runs of one flow layer, or of several that are trained jointly.
    Raises `RunError` if a checkpoint is damaged, or a run diverges: the others are trained to their ends
    first.

    Returns
    -------
    list of TrainedRun
        Of every run: where it is and how it ended.
    """
    labels = ", ".join(run.folder.name for chain in chains for run in chain.runs)
    first = chains[0].runs[0]
    with ExitStack() as files:
        distributed.wait()  # what `--force` deletes must be gone before any process looks for a checkpoint
        for chain in chains:
            chain.begin(files, resume=resume)
        start = min((chain.step for chain in chains if not chain.finished), default=0)
        total = max(chain.num_steps for chain in chains) * first.tokens_per_step
        done = start * first.tokens_per_step
        task = files.enter_context(progress.task(f"{verb} {labels}", total, "tokens", done=done))
        while active := [chain for chain in chains if chain.goes_on]:
            step = min(chain.step for chain in active)
            for chain in active:
                chain.join()
            stop = min(chain.stage_end for chain in active)  # also of those whose checkpoint is further on
            fields = BatchFields()
            for chain in active:
                fields |= chain.fields
            for alone, waited in _batches(first, fields, step, stop):
                batch = replace(alone, num_consumers=sum(len(chain.runs) for chain in active))
                for chain in active:
                    if chain.step == batch.step and chain.goes_on:
                        chain.advance(batch, waited)
                shown = {"loss": f"{sum(run.loss for run in chains[0].runs):.4f}"}
                if not math.isnan(chains[0].nmse):  # not measured before the first line of the log
                    shown["NMSE"] = f"{chains[0].nmse:.4f}"
                task.advance(first.tokens_per_step, **shown)
                if not any(chain.goes_on for chain in active):
                    break
    results = [result for chain in chains if not chain.error for result in chain.finish()]
    for chain in chains:
        if chain.error:
            raise chain.error
    return results


def _batches(run: Run, fields: BatchFields, step: int, stop: int) -> Iterator[tuple[Batch, float]]:
    """Batches of steps `step` to `stop - 1`, and the seconds waited for each."""
    batches = run.reader.shuffled(fields, run.order, step)
    for _ in range(step, stop):
        before = time.monotonic()
        batch = next(batches)
        yield batch, time.monotonic() - before


def _first_batches_of(run: TrainingRun, state: int) -> Iterator[Batch]:
    return _first_batches(run, (state,))


def _first_batches(run: TrainingRun, states: tuple[int, ...]) -> Iterator[Batch]:
    """What a start in closed form is fitted on."""
    steps = min(math.ceil(starts.TOKENS / run.tokens_per_step), run.num_steps)
    return (batch for batch, _ in _batches(run, BatchFields(states), 0, steps))
