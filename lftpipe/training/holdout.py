"""Evaluations during training: on sequences kept back from it, and, only to be logged, on validation."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lftpipe.data.batches import Batch, BatchFields
from lftpipe.teacher.tail import Layers
from lftpipe.training.step import Run, losses_of, nmse_of, squares_of


class HoldOut:
    """Sequences of the end of the training split, and the first of validation.

    Only what is held back decides anything: which weights are best, and when to stop.

    Parameters
    ----------
    bridges
        The teacher's layers from each block to the next one.
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
