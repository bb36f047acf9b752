"""Steps chosen token by token at run time, by a rule that needs no teacher (section 7 names it as open).

Each evaluation of Euler's method predicts the end of the path: the straight line on from where the
token is. If an evaluation changes a token's predicted end by little, the token is finished: it keeps
its velocity for the rest of the way. What finished tokens save is counted, not made: the batch is
evaluated whole, since tokens that go on attend to finished ones at every time.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lftpipe.flow.path import States, over
from lftpipe.flow.solver import VelocityField

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
