"""The training loop: batches in, trained layers out, resumable, judged on held-back sequences."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import torch

from lftpipe.base import progress
from lftpipe.base.errors import DivergenceError
from lftpipe.data.batches import Batch, BatchFields
from lftpipe.results.outcomes import TrainedRun
from lftpipe.training import distributed, starts
from lftpipe.training.checkpoint import Checkpoint
from lftpipe.training.log import Log
from lftpipe.training.optimizer import WeightAverage
from lftpipe.training.rolling import Standing
from lftpipe.training.run import TrainedPart, TrainingRun, look_every
from lftpipe.training.step import Run, loss_of, nmse_of, squares_of, take_step

# --- Evaluations during training: on sequences kept back from it, and, only to be logged, on validation.


class HoldOut:
    """Sequences of the end of the training split, and the first of validation.

    Only what is held back decides anything: which weights are best, and when to stop.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        store, used, most = run.store, run.order.num_sequences, run.sequences_held_back
        validation = store.num_sequences("validation") if run.predicts_states else 0
        self._sequences = {
            "train": range(used, store.num_sequences("train"))[:most],
            "validation": range(validation)[:most],
        }

    def evaluate(self) -> dict[str, float]:
        """`held_back_loss`, `held_back_nmse` and `validation_nmse`, of what there is."""
        started = time.monotonic()
        figures: dict[str, float] = {}
        with self.run.weights.shown():
            for split, key in (("train", "held_back"), ("validation", "validation")):
                if self._sequences[split]:
                    self._evaluate_split(split, key, figures)
        if "held_back_loss" in figures:
            self.run.judge(figures["held_back_loss"])
        self.run.seconds += time.monotonic() - started
        return figures

    @torch.no_grad()
    def _evaluate_split(self, split: str, key: str, figures: dict[str, float]) -> None:
        loss, squares = 0.0, torch.zeros(2)
        for batch in self._batches(split):
            squares = squares + squares_of(self.run, batch).to(squares.device)
            if key == "held_back":
                loss += loss_of(self.run, batch).item() * len(batch)
        figures[f"{key}_nmse"] = nmse_of(squares)
        if key == "held_back":
            figures["held_back_loss"] = loss / len(self._sequences[split])

    def _batches(self, split: str) -> Iterator[Batch]:
        """The same each time: the step, of which the random draws are a function, is the batch's number."""
        sequences, size = self._sequences[split], self.run.order.batch_size
        for number, start in enumerate(range(sequences.start, sequences.stop, size)):
            part = range(start, min(start + size, sequences.stop))
            yield self.run.reader.read(split, part, self.run.fields, number)


# --- The training loop: batches in, trained flow layers out, resumable at any checkpoint.


class Learner:
    """A run while it is trained: its steps, logged, judged and saved where it is time to.

    `error`: why it stopped before its end, if it did.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.settings
        if isinstance(run, TrainingRun):
            for one in _fitted(run):
                starts.last_maps(run, one)  # refused before anything is written
        self.nmse = math.nan
        self.error: DivergenceError | None = None
        self._hold_out = HoldOut(run) if self.settings.evaluate_every else None
        self._standing = _standing_of(run)
        self._checkpoint = Checkpoint(run, self._standing.passed if self._standing else lambda _: None)
        self._look_every = look_every(run.device)
        self._saved = time.monotonic()
        self._joined = -1

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to do."""
        return not self.run.finished and self.error is None

    def begin(self, files: ExitStack, *, resume: bool) -> None:
        """Fit or restore what the first step starts from, and open the log.

        `files`: closes it, and waits for a checkpoint that is being written.
        `resume`: whether to go on from a checkpoint, if there is one.
        """
        run = self.run
        files.callback(self._checkpoint.wait)
        if resume:
            self._checkpoint.restore()
        if self._standing and distributed.rank() == 0 and not run.finished:
            self._standing.passed(run.step)
        if isinstance(run, TrainingRun) and run.step == 0:
            for one in _fitted(run):
                starts.refit(run, one, partial(_first_batches, run, one.part.block))
            for one in run.narrow:
                starts.fit(run, one, partial(_first_batches_of, run))
        self._log = files.enter_context(closing(Log(run)))
        if run.step == 0 and self._hold_out and run.starts_trained:
            self._log.write(0.0, math.nan, self._hold_out.evaluate())

    def join(self) -> None:
        """Let the parts of a student follow one another, where they learned alone until now.

        A checkpoint at this step is from before it.
        """
        if self._joined == self.run.step:
            return
        self._joined = self.run.step
        if isinstance(self.run, TrainingRun) and self.run.was_local:
            starts.follow(self.run, partial(_first_batches_of, self.run))
            self.run.weights = WeightAverage(self.run.module, self.settings.ema)

    def advance(self, batch: Batch, waited: float) -> None:
        """One step. The error is kept if the run diverges: others may go on."""
        started, look, run = time.monotonic(), self._is_time_to_look(), self.run
        try:
            rate = take_step(run, batch, look=look)
        except DivergenceError as error:
            self.error = error
            self._leave()
            return
        run.waited += waited
        run.seconds += waited + time.monotonic() - started
        is_judged = self._hold_out and self._is_time(self.settings.evaluate_every)
        figures = self._hold_out.evaluate() if self._hold_out and is_judged else {}
        if figures or self._is_time(self.settings.log_every):
            self.nmse = nmse_of(squares_of(run, batch))
            self._log.write(rate, self.nmse, figures)
        if look and self._is_time_to_save() and not run.finished:
            self._log.flush()
            self._checkpoint.save()
            self._saved = time.monotonic()
        if run.finished:
            self._leave()

    def _leave(self) -> None:
        """A rolling store need keep nothing for this run."""
        self._checkpoint.wait()
        if self._standing and distributed.rank() == 0:
            self._standing.leave()

    def _enters_window(self, step: int) -> bool:
        return self._standing is not None and self._standing.enters_window(step)

    def _is_time(self, every: int) -> bool:
        return self.run.step % every == 0 or self.run.step == self.run.num_steps

    def _is_time_to_save(self) -> bool:
        """By steps, or by the clock of the process that writes; the others don't ask theirs."""
        steps, seconds = self.settings.checkpoint_every, 60 * self.settings.checkpoint_minutes
        by_clock = seconds > 0 and time.monotonic() - self._saved >= seconds
        by_step = steps > 0 and self.run.step % steps == 0
        return by_clock or by_step or self._enters_window(self.run.step)

    def _is_time_to_look(self) -> bool:
        """Whether the next step's weights may be logged, judged or saved, or nobody has looked for long."""
        settings, step = self.settings, self.run.step + 1
        every = (settings.log_every, settings.checkpoint_every, settings.evaluate_every, self._look_every)
        by_step = step == self.run.num_steps or any(step % period == 0 for period in every if period)
        return by_step or self._enters_window(step)

    def finish(self) -> TrainedRun:
        """Write the run's weights and manifest."""
        result = self.run.finish()
        self._checkpoint.drop()
        distributed.wait()
        return result


def _fitted(run: TrainingRun) -> list[TrainedPart]:
    """The parts that start in closed form."""
    return run.parts if run.settings.init == "readout" else []


def _standing_of(run: Run) -> Standing | None:
    """For the producer of a rolling store, if a run reads its states."""
    if not run.store.spec.rolling or not isinstance(run, TrainingRun) or run.settings.from_teacher:
        return None
    return Standing(run.folder, run.store, run.order.batch_size, run.num_steps)


def train_together(
    learners: Sequence[Learner], *, resume: bool = False, verb: str = "train"
) -> list[TrainedRun]:
    """Train runs that share store, batches and seed from one stream of batches, each read once.

    Raises `RunError` if a checkpoint is damaged, or a run diverges: the others are trained to their ends
    first.
    """
    together = [learner.run for learner in learners]
    first = together[0]
    with ExitStack() as files:
        distributed.wait()  # what `--force` deletes must be gone before any process looks for a checkpoint
        for learner in learners:
            learner.begin(files, resume=resume)
        start = min((run.step for run in together if not run.finished), default=0)
        total = max(run.num_steps for run in together) * first.tokens_per_step
        done = start * first.tokens_per_step
        labels = ", ".join(run.folder.name for run in together)
        task = files.enter_context(progress.task(f"{verb} {labels}", total, "tokens", done=done))
        while active := [learner for learner in learners if learner.goes_on]:
            step = min(learner.run.step for learner in active)
            for learner in active:
                learner.join()
            # Also of those whose checkpoint is further on.
            stop = min(learner.run.stage_end for learner in active)
            fields = BatchFields()
            for learner in active:
                fields |= learner.run.fields
            for alone, waited in _batches(first, fields, step, stop):
                batch = replace(alone, num_consumers=len(active))
                for learner in active:
                    if learner.run.step == batch.step and learner.goes_on:
                        learner.advance(batch, waited)
                shown = {"loss": f"{first.loss:.4f}"}
                if not math.isnan(learners[0].nmse):  # not measured before the first line of the log
                    shown["NMSE"] = f"{learners[0].nmse:.4f}"
                task.advance(first.tokens_per_step, **shown)
                if not any(learner.goes_on for learner in active):
                    break
    results = [learner.finish() for learner in learners if not learner.error]
    for learner in learners:
        if learner.error:
            raise learner.error
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
