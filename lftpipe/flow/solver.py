"""Solvers of the flow's equation: Euler and midpoint steps, and steps chosen for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lftpipe.flow.path import States, Times, over

# --- Solvers of `dx/dt = u(x, t)` from 0 to 1: Euler (eq. 4) and midpoint (eq. 5), algorithm 3.

#: `(x, t, step_size)` to `dx/dt` at `x` and `t`; a step size of 0 asks for the velocity of that very moment.
VelocityField = Callable[[States, Times, Times], States]
Method = Literal["euler", "midpoint"]
Step = Callable[[VelocityField, States, Times, Times], States]


def euler_step(velocity: VelocityField, x: States, t: Times, t_next: Times) -> States:
    """`x + d u(x, t)` (eq. 4): first order, one evaluation.

    Parameters
    ----------
    velocity
        The field `u`.
    x
        The states at `t`.
    t, t_next
        Where the step begins and ends; `d` is their difference.
    """
    step_size = t_next - t
    return x + over(step_size, x) * velocity(x, t, step_size)


def midpoint_step(velocity: VelocityField, x: States, t: Times, t_next: Times) -> States:
    """`x + d u(x + d/2 u(x, t), t + d/2)` (eq. 5): second order, two evaluations.

    Parameters
    ----------
    velocity
        The field `u`.
    x
        The states at `t`.
    t, t_next
        Where the step begins and ends; `d` is their difference.
    """
    step_size = t_next - t
    middle = x + over(step_size / 2, x) * velocity(x, t, step_size)
    return x + over(step_size, x) * velocity(middle, t + step_size / 2, step_size)


STEPS: dict[str, Step] = {"euler": euler_step, "midpoint": midpoint_step}

#: Evaluations of the velocity in one step: `k` steps have NFE = `k * EVALUATIONS[method]`.
EVALUATIONS: dict[str, int] = {"euler": 1, "midpoint": 2}


@dataclass(frozen=True)
class ODESolver:
    """Carries states along a velocity field.

    Parameters
    ----------
    velocity
        `(x, t, step_size)` to `dx/dt`.
    """

    velocity: VelocityField

    def sample(
        self,
        x_init: States,
        step_size: float | None = None,
        method: Method = "midpoint",
        time_grid: Float[Tensor, "time"] | Float[Tensor, "time sequence"] | None = None,
    ) -> States:
        """The states at the end of the way.

        Parameters
        ----------
        x_init
            Where to begin.
        step_size
            `1 / k` makes `k` equal steps from 0 to 1 (algorithm 3).
        method
            `euler` or `midpoint`.
        time_grid
            In place of `step_size`: the times from which and to which to step, the same for all sequences or
            its own for each. If neither is given, one step leads from 0 to 1.

        Raises
        ------
        ValueError
            If both are given, or `step_size` does not divide the way from 0 to 1 into equal steps.
        """
        if time_grid is None:
            time_grid = equal_times(1.0 if step_size is None else step_size, x_init.device)
        elif step_size is not None:
            raise ValueError("give either step_size or time_grid")
        if time_grid.ndim == 1:
            time_grid = time_grid[:, None].expand(-1, len(x_init))
        step, x = STEPS[method], x_init
        for t, t_next in pairwise(time_grid):
            x = step(self.velocity, x, t, t_next)
        return x


def equal_times(step_size: float, device: torch.device | None = None) -> Float[Tensor, "time"]:
    """The times 0, `step_size`, ..., 1.

    Parameters
    ----------
    step_size
        `1 / k` for `k` steps.
    device
        Where the times are to be.

    Raises
    ------
    ValueError
        If `step_size` is no such fraction.
    """
    steps = round(1 / step_size) if step_size > 0 else 0
    if steps < 1 or abs(steps * step_size - 1) > 1e-6:
        raise ValueError(f"step_size {step_size} is not 1/k for a whole number of steps k")
    return torch.linspace(0, 1, steps + 1, device=device)


# --- Steps chosen token by token at run time, by a rule that needs no teacher (section 7 names it as open).
#
# Each evaluation of Euler's method predicts the end of the path: the straight line on from where the token
# is. If an evaluation changes a token's predicted end by little, the token is finished: it keeps its
# velocity for the rest of the way. What finished tokens save is counted, not made: the batch is evaluated
# whole, since tokens that go on attend to finished ones at every time.

#: Added to norms that divide, in case a prediction is all zeros.
TINY = 1e-12


class AdaptiveSample(NamedTuple):
    """Where the tokens end, and how many evaluations each of them took part in."""

    x_1: States
    evaluations: Int[Tensor, "sequence position"]


def sample_adaptively(
    velocity: VelocityField, x_init: States, max_steps: int, threshold: float
) -> AdaptiveSample:
    """`x_1` by at most `max_steps` equal steps of Euler's, fewer where the prediction has settled.

    After evaluation `i` at `t_i` a token's predicted end is `p_i = x_i + (1 - t_i) u(x_i, t_i)`; `p_0` is
    fixed Euler's with one step, and what stands before it is `x_0` itself. A token is finished once
    `|p_i - p_{i-1}| < threshold |p_i|`, with its end at `p_i`.

    Parameters
    ----------
    velocity
        `(x, t, step_size)` to `dx/dt`; evaluated for all tokens while any of them goes on.
    x_init
        Where the walk begins, at `t = 0`.
    max_steps
        Steps of a token that does not settle.
    threshold
        Relative change below which a token is finished: 0 gives `max_steps` fixed steps to the bit,
        infinity one.
    """
    grid = torch.linspace(0, 1, max_steps + 1, device=x_init.device)
    x, held = x_init, torch.zeros_like(x_init)
    active: Bool[Tensor, "sequence position"] = torch.ones(
        x.shape[:2], dtype=torch.bool, device=x_init.device
    )
    evaluations = torch.zeros(x.shape[:2], dtype=torch.long, device=x_init.device)
    for step in range(max_steps):
        t, t_next = grid[step].expand(len(x)), grid[step + 1].expand(len(x))
        u = torch.where(active[..., None], velocity(x, t, t_next - t), held)
        evaluations += active
        # The ends before and after differ by the turn of the velocity over the time that is left.
        change = (over(1 - t, x) * (u - held)).norm(dim=-1)
        end = x + over(1 - t, x) * u
        active = active & ~(change < threshold * end.norm(dim=-1).clamp_min(TINY))
        if not active.any():
            return AdaptiveSample(end, evaluations)
        x, held = x + over(t_next - t, x) * u, u
    return AdaptiveSample(x, evaluations)
