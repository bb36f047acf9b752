"""The learning rate where none is given: what was tuned, but no larger than the teacher's weights allow.

Optimisers step by their rate, whatever the size of the weights, and teachers' weights differ tenfold in size.
As fractions of the weights, the tuned rates are alike (docs/log.md, "a rate for every teacher").
"""

import torch
from torch import nn

from lftpipe.config.settings import TrainSettings

#: At the peak. Muon's steps are scaled to the size of AdamW's, and may be larger.
LEARNING_RATES = {"muon": 2e-2, "adamw": 3e-3}

#: Of `distil`, by Muon; chosen on sequences held back (docs/results/rivals.md).
DISTIL_RATE = 5e-3

#: Root mean square of what a step at a rate of 1 adds to a matrix (Muon: Liu et al., arXiv 2502.16982).
STEP_SIZE = {"muon": 0.2, "adamw": 1.0}

#: The largest step, as a fraction of the weights' own root mean square; that of `distil` by Muon.
LARGEST_STEP, LARGEST_DISTIL_STEP = 0.075, 0.0185


def peak_rate(settings: TrainSettings, start: nn.Module | None) -> float:
    """The learning rate at its peak: as given, or a default for a layer that starts from another one.

    Parameters
    ----------
    start
        The teacher's layer from which the flow layer starts; without one the default is what was tuned.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    rate, largest = LEARNING_RATES[settings.optimizer], LARGEST_STEP
    if settings.objective == "distil" and settings.optimizer == "muon":
        rate, largest = DISTIL_RATE, LARGEST_DISTIL_STEP
    if start is None:
        return rate
    return min(rate, _two_digits(largest * weight_size(start) / STEP_SIZE[settings.optimizer]))


def weight_size(layer: nn.Module) -> float:
    """Root mean square of all entries of a layer's matrices; infinite where it has none."""
    matrices = [weight.detach().float() for weight in layer.parameters() if weight.ndim >= 2]
    if not matrices:
        return torch.inf
    squares = sum(matrix.square().sum().item() for matrix in matrices)
    return (squares / sum(matrix.numel() for matrix in matrices)) ** 0.5


def _two_digits(rate: float) -> float:
    """Rounded, so that it is told as it is, and is the same on every machine."""
    return float(f"{rate:.1e}")
