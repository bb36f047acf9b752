"""Paths from `x_0 = h[m]` to `x_1 = h[n]` that flow matching regresses velocities on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

States = Float[Tensor, "sequence position feature"]
Times = Float[Tensor, "sequence"]


def over(t: Times, x: States) -> Float[Tensor, "sequence 1 1"]:
    """One time per sequence, shaped to multiply its states.

    Parameters
    ----------
    t
        The times.
    x
        States, whose number format the result has.
    """
    return t.to(x.dtype)[:, None, None]


@dataclass(frozen=True)
class PathSample:
    """A point of a path and its derivative there."""

    t: Times
    x_t: States
    dx_t: States


@dataclass(frozen=True)
class LinearPath:
    """The straight line `x_t = (1-t) x_0 + t x_1` (section 2, algorithm 1).

    Parameters
    ----------
    x_0, x_1
        Where it begins and ends.
    """

    x_0: States
    x_1: States

    def sample(self, t: Times) -> PathSample:
        """The point at one time per sequence.

        Parameters
        ----------
        t
            The times.
        """
        return PathSample(t, torch.lerp(self.x_0, self.x_1, over(t, self.x_0)), self.x_1 - self.x_0)


@dataclass(frozen=True)
class PiecewiseLinearPath:
    """Through the teacher's own states: `h[m+i]` at `t = i / (n-m)`, straight between them.

    Unlike the straight line from end to end, the teacher's trajectory never crosses another one
    at the same `t`: its layers are a function of the state.

    Parameters
    ----------
    states
        `h[m] .. h[n]`.
    """

    states: Float[Tensor, "state sequence position feature"]

    def sample(self, t: Times) -> PathSample:
        """The point at one time per sequence.

        Parameters
        ----------
        t
            The times.
        """
        num_lines = self.states.shape[0] - 1
        scaled = t * num_lines
        index = scaled.floor().clamp(0, num_lines - 1).long()
        rows = torch.arange(self.states.shape[1], device=t.device)
        start, stop = self.states[index, rows], self.states[index + 1, rows]
        x_t = torch.lerp(start, stop, over(scaled - index, start))
        return PathSample(t, x_t, num_lines * (stop - start))
