"""The terms of a loss on one batch: what several of them need is computed once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.batch import Batch
from lftpipe.config.outside import load_term
from lftpipe.errors import SettingsError
from lftpipe.flow.objective import ErrorScale, Loss, branch_matching, flow_matching, flow_walking
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath, States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.stack import LayerStack
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.tail import Tail
from lftpipe.training.logit_terms import logit_divergence, sampled_logit_divergence, top_logit_divergence


@dataclass(frozen=True)
class Problem:
    """One batch seen by one flow layer, with every random draw of the step."""

    flow: Velocity | LayerStack
    block: tuple[int, int]
    batch: Batch
    x_0: States
    t: Times
    time_grid: Float[Tensor, "time sequence"]
    method: Method
    scale: ErrorScale
    tail: Tail | None

    @property
    def x_1(self) -> States:
        """The teacher's state at the block's end."""
        return self.batch.states[self.block[1]]

    def velocity(self, x: States, t: Times, step_size: Times) -> States:
        """The flow layer's velocity on these sequences.

        Parameters
        ----------
        x, t
            States, and one time per sequence.
        step_size
            For a velocity that is told it.
        """
        return self.flow(x, t, self.batch.context, source=self.x_0, step_size=step_size)

    @cached_property
    def end(self) -> States:
        """Where the walk from `x_0` along the time grid ends."""
        return ODESolver(self.velocity).sample(self.x_0, method=self.method, time_grid=self.time_grid)


def _fw(problem: Problem) -> Loss:
    return flow_walking(problem.end, problem.x_1, problem.scale)


def _sfm(problem: Problem) -> Loss:
    path = LinearPath(problem.x_0, problem.x_1)
    return flow_matching(problem.velocity, path.sample(problem.t), problem.x_1, problem.scale)


def _trajectory(problem: Problem) -> Loss:
    m, n = problem.block
    path = PiecewiseLinearPath(torch.stack([problem.batch.states[l] for l in range(m, n + 1)]))  # noqa: E741
    return flow_matching(problem.velocity, path.sample(problem.t), problem.x_1, problem.scale)


def _branches(problem: Problem) -> Loss:
    m, n = problem.block
    attention = torch.stack([problem.batch.attention[l] for l in range(m, n)]).sum(0)  # noqa: E741
    sample = LinearPath(problem.x_0, problem.x_1).sample(problem.t)
    moment = torch.zeros_like(sample.t)
    assert isinstance(problem.flow, Velocity), "a stack of layers has no two branches"
    parts = problem.flow.branches(
        sample.x_t, sample.t, problem.batch.context, source=problem.x_0, step_size=moment
    )
    return branch_matching(parts, (attention, sample.dx_t - attention), problem.x_1, problem.scale)


def _logits(problem: Problem) -> Loss:
    assert problem.tail is not None
    return logit_divergence(problem.tail, problem.end, problem.batch, problem.block[1])


def _top_logits(problem: Problem) -> Loss:
    assert problem.tail is not None
    return top_logit_divergence(problem.tail, problem.end, problem.batch, problem.block[1])


def _sampled_logits(problem: Problem) -> Loss:
    assert problem.tail is not None
    return sampled_logit_divergence(problem.tail, problem.end, problem.batch, problem.block[1])


#: What computes the terms of `lftpipe.config.loss.TERMS`; regression is a walk of one step without time.
TERMS: dict[str, Callable[[Problem], Loss]] = {
    "fw": _fw,
    "regression": _fw,
    "sfm": _sfm,
    "trajectory": _trajectory,
    "branches": _branches,
    "logits": _logits,
    "top-logits": _top_logits,
    "sampled-logits": _sampled_logits,
}


def weighted_sum(problem: Problem, weights: dict[str, float]) -> Loss:
    """The terms of one stage, each times its weight.

    Parameters
    ----------
    problem
        On which they are computed.
    weights
        By the name of the term.
    """
    return sum((weight * _term(name, problem) for name, weight in weights.items()), problem.x_0.new_zeros(()))


def _term(name: str, problem: Problem) -> Loss:
    """One term; of one from outside it is checked what it gives."""
    if name in TERMS:
        return TERMS[name](problem)
    value: Any = load_term(name)(problem)
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        given = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise SettingsError(
            f"the term {name!r}, which gives {given}", "a scalar", "take the mean over positions"
        )
    return value
