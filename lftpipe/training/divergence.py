"""Losses and gradients that are not finite are noticed, though not every step waits for the device."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: Steps between looks, by the kind of device; a processor has nothing to wait for.
LOOK_EVERY = {"cpu": 1}
OTHERWISE = 20


def look_every(device: torch.device) -> int:
    """Steps after which a loss or gradient that is not finite is noticed at the latest."""
    return LOOK_EVERY.get(device.type, OTHERWISE)


class DivergenceState(NamedTuple):
    """What a look found."""

    loss: float
    """That of the last step, or of the first one that was not finite."""
    norm: float
    """The same of the gradient."""
    diverged_at: int | None
    """The first step whose loss or gradient was not finite."""


class DivergenceWatch:
    """Follows a run's losses and gradient norms where they are computed.

    `add` takes no look at the numbers, so nothing is waited for. What was computed with a loss that is not
    finite must not be kept: look before weights are written or judged.
    """

    def __init__(self, device: torch.device) -> None:
        # Step, loss and norm of the first bad step, of the last one while all are good; whether one was bad.
        self._state = torch.zeros(4, device=device)

    @torch.no_grad()
    def add(self, step: int, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        """Take note of a step.

        `loss`, `norm`: its loss and the norm of its gradient, on the device.
        """
        loss, norm = loss.float(), norm.float()
        bad = ~(loss.isfinite() & norm.isfinite())
        entry = torch.stack([torch.full_like(loss, step), loss, norm, bad.float()])
        # Chosen on the device: an `if` would have to wait for the loss.
        self._state = torch.where(self._state[3] > 0, self._state, entry)

    def look(self) -> DivergenceState:
        """What was noted so far; waits for the device."""
        step, loss, norm, bad = self._state.tolist()
        return DivergenceState(loss, norm, int(step) if bad else None)
