"""Solvers of `dx/dt = u(x, t)` from 0 to 1: Euler (eq. 4) and midpoint (eq. 5), algorithm 3."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.flow.path import States, Times, over

#: `(x, t, d)` to `dx/dt` at `x` and `t`, for a step of size `d`; 0 asks for the velocity of that very moment.
VelocityField = Callable[[States, Times, Times], States]
Method = Literal["euler", "midpoint"]
Step = Callable[[VelocityField, States, Times, Times], States]


def euler_step(velocity: VelocityField, x: States, t: Times, t_next: Times) -> States:
    """`x + d u(x, t)` (eq. 4): first order, one evaluation."""
    d = t_next - t
    return x + over(d, x) * velocity(x, t, d)


def midpoint_step(velocity: VelocityField, x: States, t: Times, t_next: Times) -> States:
    """`x + d u(x + d/2 u(x, t), t + d/2)` (eq. 5): second order, two evaluations."""
    d = t_next - t
    middle = x + over(d / 2, x) * velocity(x, t, d)
    return x + over(d, x) * velocity(middle, t + d / 2, d)


STEPS: dict[str, Step] = {"euler": euler_step, "midpoint": midpoint_step}
EVALUATIONS: dict[str, int] = {"euler": 1, "midpoint": 2}


@dataclass(frozen=True)
class ODESolver:
    """Carries states along a velocity field.

    Parameters
    ----------
    velocity
        `(x, t, d)` to `dx/dt`.
    method
        `euler` or `midpoint`.
    """

    velocity: VelocityField
    method: Method = "midpoint"

    def sample(self, x_init: States, num_steps: int) -> States:
        """`x_1` by `num_steps` equal steps (algorithm 3); NFE = `evaluations(num_steps)`."""
        grid = torch.linspace(0, 1, num_steps + 1, device=x_init.device)
        return self.walk(x_init, grid[:, None].expand(-1, x_init.shape[0]))

    def walk(self, x_init: States, time_grid: Float[Tensor, "time sequence"]) -> States:
        """`x` at the last of the times, stepping through all of them; each sequence has its own."""
        step, x = STEPS[self.method], x_init
        for t, t_next in pairwise(time_grid):
            x = step(self.velocity, x, t, t_next)
        return x

    def evaluations(self, num_steps: int) -> int:
        """Number of function evaluations, NFE."""
        return EVALUATIONS[self.method] * num_steps
