"""Evaluations during training: on sequences kept back from it, and, only to be logged, on validation."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from lftpipe.batch import Batch
from lftpipe.training.chain import Chain

#: Sequences of a split that an evaluation looks at, at most.
SEQUENCES = 32


class HoldOut:
    """Sequences of the end of the training split, and the first of validation.

    Only what is held back decides anything: which weights are best, and when to stop.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        first = chain.runs[0]
        store, used = first.store, first.order.num_sequences
        self._rows = {
            "train": range(used, store.num_sequences("train"))[:SEQUENCES],
            "validation": range(store.num_sequences("validation"))[:SEQUENCES],
        }

    def evaluate(self) -> dict[Path, dict[str, float]]:
        """By run's folder: `held_back_loss`, `held_back_nmse`, `validation_nmse`; judges every run."""
        started = time.monotonic()
        found: dict[Path, dict[str, float]] = {run.folder: {} for run in self.chain.runs}
        with ExitStack() as shown:
            for run in self.chain.runs:
                shown.enter_context(run.weights.shown())
            for split, key in (("train", "held_back"), ("validation", "validation")):
                if self._rows[split]:
                    self._evaluate_split(split, key, found)
        for run in self.chain.runs:
            if "held_back_loss" in found[run.folder]:
                run.judge(found[run.folder]["held_back_loss"])
            run.seconds += time.monotonic() - started
        return found

    @torch.no_grad()
    def _evaluate_split(self, split: str, key: str, found: dict[Path, dict[str, float]]) -> None:
        batches = 0
        losses = [0.0] * len(self.chain.runs)
        nmses = [0.0] * len(self.chain.runs)
        for batch in self._batches(split):
            batches += 1
            for i, nmse in enumerate(self.chain.nmse(batch)):
                nmses[i] += nmse
            if key == "held_back":
                for i, loss in enumerate(self.chain.losses(batch)):
                    losses[i] += loss.item()
        for run, loss, nmse in zip(self.chain.runs, losses, nmses, strict=True):
            found[run.folder][f"{key}_nmse"] = nmse / batches
            if key == "held_back":
                found[run.folder]["held_back_loss"] = loss / batches

    def _batches(self, split: str) -> Iterator[Batch]:
        """The same each time: the step, of which the random draws are a function, is the batch's number."""
        run, rows = self.chain.runs[0], self._rows[split]
        for number, start in enumerate(range(rows.start, rows.stop, run.order.batch_size)):
            part = range(start, min(start + run.order.batch_size, rows.stop))
            yield run.reader.read(split, part, self.chain.fields, number)
