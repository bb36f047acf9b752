"""Which weights of a run are kept: the last, their average, or the best."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


class WeightAverage:
    """Follows a module's weights through training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._average = copy_of(module) if decay else None
        self._best: Weights | None = None
        self.best_loss, self._since_best = math.inf, 0

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after a step."""
        if self._average is not None:
            # A short memory at first, or the average would hold on to where it began.
            decay = min(self._decay, (1 + step) / (10 + step))
            for name, value in trained_weights(self._module).items():
                self._average[name].lerp_(value, 1 - decay)

    def judge(self, loss: float) -> int:
        """Take note of an evaluation; how many there were since the best."""
        if loss < self.best_loss:
            self.best_loss, self._since_best = loss, 0
            with self.shown():
                self._best = copy_of(self._module)
        else:
            self._since_best += 1
        return self._since_best

    def forget_best(self) -> None:
        """Another loss begins, which has another best."""
        self._best, self.best_loss, self._since_best = None, math.inf, 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The module with the averaged weights, if any, as it is evaluated."""
        if self._average is None:
            yield
            return
        trained = copy_of(self._module)
        set_weights(self._module, self._average)
        try:
            yield
        finally:
            set_weights(self._module, trained)

    def settle(self) -> None:
        """Give the module the weights that are kept."""
        if weights := self._best or self._average:
            set_weights(self._module, weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "average": self._average,
            "best": self._best,
            "best_loss": self.best_loss,
            "since_best": self._since_best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._average, self._best = state["average"], state["best"]
        self.best_loss, self._since_best = state["best_loss"], state["since_best"]


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """What learns of a module, by name: all else is the same in every process that makes it."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def copy_of(module: nn.Module) -> Weights:
    """Weights that further training leaves alone."""
    return {name: weight.detach().clone() for name, weight in trained_weights(module).items()}


@torch.no_grad()
def set_weights(module: nn.Module, weights: Weights) -> None:
    """Give a module the weights that `copy_of` gave.

    Raises `ValueError` if they are of another module.
    """
    learns = trained_weights(module)
    if learns.keys() != weights.keys():
        raise ValueError("weights of other names: it was written by another version")
    for name, weight in learns.items():
        weight.copy_(weights[name])
