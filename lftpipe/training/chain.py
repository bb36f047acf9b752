"""Flow layers of one student that are trained jointly: each begins where the one before it ends."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lftpipe import runs
from lftpipe.batch import Batch, BatchFields
from lftpipe.flow.path import States
from lftpipe.teacher.parts import load_layer
from lftpipe.training.run import Training


class Chain:
    """One run, or several of blocks in order that do not overlap.

    With several, the second block's `x_0` is not the teacher's `h[m]` but what comes of the first
    one's prediction, through the teacher's layers between the two; the sum of their losses is minimised.
    """

    def __init__(self, training: list[Training]) -> None:
        self.runs = training
        self._bridges = [
            nn.ModuleList(load_layer(after.teacher, l) for l in range(before.n, after.m)).to(after.device)  # noqa: E741
            for before, after in pairwise(training)
        ]

    @property
    def checkpoint(self) -> Path:
        return self.runs[0].folder / runs.CHECKPOINT

    @property
    def step(self) -> int:
        return self.runs[0].step

    @property
    def num_steps(self) -> int:
        return self.runs[0].num_steps

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @property
    def stage_end(self) -> int:
        return min(run.stage_end for run in self.runs)

    @property
    def fields(self) -> BatchFields:
        """What the present stages of its runs look at."""
        fields = BatchFields()
        for run in self.runs:
            fields |= run.fields
        return fields

    def advance(self, batch: Batch) -> list[float]:
        """One step of every run; the learning rates it was made with."""
        losses = self.losses(batch)
        torch.stack(losses).sum().backward()
        return [run.apply(loss) for run, loss in zip(self.runs, losses, strict=True)]

    def losses(self, batch: Batch) -> list[Tensor]:
        """Of every run."""
        losses, x_0 = [], None
        for index, run in enumerate(self.runs):
            loss, problem = run.loss_of(batch, x_0)
            losses.append(loss)
            if index < len(self._bridges):
                x_0 = self._cross(index, problem.end, batch)
        return losses

    @torch.no_grad()
    def nmse(self, batch: Batch) -> list[float]:
        """Of every run, at inference on a batch."""
        found, x_0 = [], None
        for index, run in enumerate(self.runs):
            found.append(run.nmse(batch, x_0))
            if index < len(self._bridges):
                with run.autocast():
                    end = run.problem(batch, x_0, equal_steps=True).end
                x_0 = self._cross(index, end, batch)
        return found

    def _cross(self, index: int, end: States, batch: Batch) -> States:
        """From one block's end to the next one's start."""
        with self.runs[index].autocast():
            for layer in self._bridges[index]:
                end = layer(end, batch.context)
        return end
