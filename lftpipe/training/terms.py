"""The terms of a loss on one batch: what several of them need is computed once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.batch import Batch
from lftpipe.flow.distillation import full_divergence, top_divergence
from lftpipe.flow.objective import ErrorScale, Loss, branch_matching, flow_matching, flow_walking
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath, States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.parts import Tail


@dataclass(frozen=True)
class Problem:
    """One batch seen by one flow layer, with every random draw of the step."""

    flow: Velocity
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
    parts = problem.flow.branches(
        sample.x_t, sample.t, problem.batch.context, source=problem.x_0, step_size=moment
    )
    return branch_matching(parts, (attention, sample.dx_t - attention), problem.x_1, problem.scale)


def _logits(problem: Problem) -> Loss:
    tail, n, context = problem.tail, problem.block[1], problem.batch.context
    assert tail is not None

    def divergence(end: States, rows: slice) -> Loss:
        part = context.rows(rows)
        with torch.no_grad():
            teacher = tail(problem.x_1[rows], part, start=n)
        return full_divergence(teacher, tail(end, part, start=n))

    return _piecewise(problem.end, divergence)


def _top_logits(problem: Problem) -> Loss:
    tail, n, context, logits = problem.tail, problem.block[1], problem.batch.context, problem.batch.logits
    assert tail is not None and logits is not None
    values, ids, normaliser = logits

    def divergence(end: States, rows: slice) -> Loss:
        student = tail(end, context.rows(rows), start=n)
        return top_divergence(values[rows], ids[rows], normaliser[rows], student)

    return _piecewise(problem.end, divergence)


def _piecewise(end: States, divergence: Callable[[States, slice], Loss]) -> Loss:
    """The mean of `divergence` over sequences, one at a time: logits of a whole batch may not fit in memory.

    Each sequence's gradient is taken at once; what is returned has the mean's value and gradient.
    """
    start = end.detach()
    total, gradient = start.new_zeros(()), torch.zeros_like(start)
    for row in range(len(start)):
        rows = slice(row, row + 1)
        leaf = start[rows].requires_grad_(True)
        with torch.enable_grad():
            loss = divergence(leaf, rows) / len(start)
        (gradient[rows],) = torch.autograd.grad(loss, leaf)
        total += loss.detach()
    carried = (end * gradient).sum()
    return total + carried - carried.detach()


#: What computes the terms of `lftpipe.config.loss.TERMS`; regression is a walk of one step without time.
TERMS: dict[str, Callable[[Problem], Loss]] = {
    "fw": _fw,
    "regression": _fw,
    "sfm": _sfm,
    "trajectory": _trajectory,
    "branches": _branches,
    "logits": _logits,
    "top-logits": _top_logits,
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
    return sum((weight * TERMS[name](problem) for name, weight in weights.items()), problem.x_0.new_zeros(()))
