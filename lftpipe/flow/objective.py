"""Training objectives on paired states (section 3.1): what is minimised, given one batch.

Samples are never re-paired: the pairing of `x_0` with the teacher's own `x_1` is the point.
Every random draw comes in as an argument, so a step is a pure function of its batch.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.flow.path import PathSample, States
from lftpipe.flow.solver import VelocityField

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
        the channel's variance over the training data: every channel counts the same. One that never varies
        is measured by the median channel.
    `norm`
        as `token`, after the norm of the layer that reads the state: what that layer cannot see, such as the
        state's length, does not count.
    `none`
        the mean square of the targets of the batch: NMSE as the paper has it.

    Parameters
    ----------
    scale
        One of the above.
    channel_variance
        For `channel`: over the training data, of the target.
    norm
        For `norm`: of the layer that reads the target.
    over_processes
        For `none`: the mean of a number over the processes that share a batch.
    """

    def __init__(
        self,
        scale: str,
        channel_variance: Float[Tensor, "feature"] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        over_processes: Callable[[Tensor], Tensor] = lambda mean: mean,
    ) -> None:
        if scale == "channel" and channel_variance is None:
            raise ValueError("scale='channel' needs the channel variance")
        if scale == "norm" and norm is None:
            raise ValueError("scale='norm' needs the norm")
        self.scale = scale
        self.channel_variance = None if channel_variance is None else _without_zeros(channel_variance)
        self.norm = norm
        self.over_processes = over_processes

    def __call__(self, error: States, x_1: States) -> Loss:
        """The scaled mean of an error's squares.

        Parameters
        ----------
        error
            What is to become small.
        x_1
            The target state that it is measured against.
        """
        error, x_1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (error, x_1))
        if self.scale == "norm":
            assert self.norm is not None
            seen = self.norm(x_1)
            error, x_1 = (x.to(torch.float32) for x in (self.norm(x_1 + error) - seen, seen))
        if self.scale in ("token", "norm"):
            return (error.square().sum(-1) / (x_1.square().sum(-1) + TINY)).mean()
        if self.scale == "channel":
            assert self.channel_variance is not None
            return (error.square() / (self.channel_variance + TINY)).mean()
        return error.square().sum() / (self.over_processes(x_1.square().sum()) + TINY)


def _without_zeros(variance: Float[Tensor, "feature"]) -> Float[Tensor, "feature"]:
    """Channels that never vary, but for rounding, have no scale of their own: they take the median one's."""
    typical = torch.where(variance > 0, variance, torch.nan).nanmedian().nan_to_num(1.0)
    return torch.where(variance > 1e-9 * typical, variance, typical)


def flow_matching(velocity: VelocityField, sample: PathSample, x_1: States, scale: ErrorScale) -> Loss:
    """Algorithm 1: regress `u(x_t, t)` on the path's derivative at one `t` per sequence.

    With a straight path this is standard flow matching (SFM), with the teacher's own states the
    trajectory objective.

    Parameters
    ----------
    velocity
        What is trained.
    sample
        A point of the path, and the path's derivative there.
    x_1
        Where the path ends.
    scale
        The measure of an error.
    """
    moment = torch.zeros_like(sample.t)
    return scale(velocity(sample.x_t, sample.t, moment) - sample.dx_t, x_1)


def flow_walking(end: States, x_1: States, scale: ErrorScale) -> Loss:
    """Algorithm 2, eq. 8: regress the `end` of a walk from `x_0` on `x_1`, with gradient through its steps.

    A walk of one Euler step is the regression baseline.

    Parameters
    ----------
    end
        Where the walk ended.
    x_1
        Where it should have.
    scale
        The measure of an error.
    """
    return scale(end - x_1, x_1)


def branch_matching(
    branches: tuple[States, States], targets: tuple[States, States], x_1: States, scale: ErrorScale
) -> Loss:
    """Regress each branch of the velocity on its own part of `x_1 - x_0`.

    Parameters
    ----------
    branches
        The attention's and the MLP's part of the velocity.
    targets
        What the block's attention branches added, and what its MLPs did.
    x_1
        The state at the block's end.
    scale
        The measure of an error.
    """
    return sum((scale(u - dx, x_1) for u, dx in zip(branches, targets, strict=True)), x_1.new_zeros(()))


def walk_times(draws: Float[Tensor, "draw sequence"]) -> Float[Tensor, "time sequence"]:
    """The times of a walk: 0, the uniform draws in order, 1.

    Parameters
    ----------
    draws
        From 0 to 1, for each sequence; `k` steps take `k - 1`.
    """
    ends = draws.new_zeros(1, draws.shape[1])
    return torch.cat([ends, draws.sort(dim=0).values, ends + 1])
