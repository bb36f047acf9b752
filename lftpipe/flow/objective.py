"""Training objectives on paired states (section 3.1): what is minimised, given one batch.

Samples are never re-paired: the pairing of `x_0` with the teacher's own `x_1` is the point.
Every random draw comes in as an argument, so a step is a pure function of its batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.flow.path import LinearPath, PathSample, States, Times
from lftpipe.flow.solver import Method, ODESolver, VelocityField

Loss = Float[Tensor, ""]

#: Added to squared norms that divide, in case a state is all zeros.
TINY = 1e-12


class ErrorScale:
    """The squared error of a batch as one number, in a measure that a few huge values don't rule.

    Real models put *massive activations* on a few positions and channels, whose squares are
    most of a plain mean. `scale` says what an error is measured against:

    `token`
        the target's own squared norm: every position counts the same, as a relative error.
    `channel`
        the channel's variance over the training data: every channel counts the same.
    `none`
        the mean square of the targets of the batch: NMSE as the paper has it.

    Parameters
    ----------
    scale
        One of the above.
    channel_variance
        For `channel`: over the training data, of the target.
    """

    def __init__(self, scale: str, channel_variance: Float[Tensor, "feature"] | None = None) -> None:
        if scale == "channel" and channel_variance is None:
            raise ValueError("scale='channel' needs the channel variance")
        self.scale = scale
        self.channel_variance = channel_variance

    def __call__(self, error: States, x_1: States) -> Loss:
        """Mean of `error`'s squares, scaled by the target state `x_1`."""
        error, x_1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (error, x_1))
        if self.scale == "token":
            return (error.square().sum(-1) / (x_1.square().sum(-1) + TINY)).mean()
        if self.scale == "channel":
            assert self.channel_variance is not None
            return (error.square() / (self.channel_variance + TINY)).mean()
        return error.square().sum() / (x_1.square().sum() + TINY)


def flow_matching(velocity: VelocityField, sample: PathSample, x_1: States, scale: ErrorScale) -> Loss:
    """Algorithm 1: regress `u(x_t, t)` on the path's derivative at one `t` per sequence.

    With a straight path this is standard flow matching (SFM), with the teacher's own states the
    trajectory objective.
    """
    return scale(velocity(sample.x_t, sample.t) - sample.dx_t, x_1)


def flow_walking(
    velocity: VelocityField,
    x_0: States,
    x_1: States,
    time_grid: Float[Tensor, "time sequence"],
    method: Method,
    scale: ErrorScale,
) -> Loss:
    """Algorithm 2, eq. 8: walk from 0 to 1 and regress the end point, with gradient through all steps."""
    return scale(ODESolver(velocity, method).walk(x_0, time_grid) - x_1, x_1)


def hybrid(
    velocity: VelocityField,
    x_0: States,
    x_1: States,
    time_grid: Float[Tensor, "time sequence"],
    t: Times,
    method: Method,
    alpha: float,
    scale: ErrorScale,
) -> Loss:
    """Eq. 9: flow walking plus `alpha` times standard flow matching."""
    walking = flow_walking(velocity, x_0, x_1, time_grid, method, scale)
    if alpha == 0:
        return walking
    return walking + alpha * flow_matching(velocity, LinearPath(x_0, x_1).sample(t), x_1, scale)


def walk_times(draws: Float[Tensor, "draw sequence"]) -> Float[Tensor, "time sequence"]:
    """The times of a walk: 0, the uniform draws in order, 1. `k` steps take `k - 1` draws."""
    ends = draws.new_zeros(1, draws.shape[1])
    return torch.cat([ends, draws.sort(dim=0).values, ends + 1])
