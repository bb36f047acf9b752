"""The terms of `--loss` on a batch: states, logits through the frozen tail, stored logits, sampled ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lftpipe.base.device import cast_linear
from lftpipe.base.errors import SettingsError, TeacherError
from lftpipe.config.loss import ON_LOGITS, load_term
from lftpipe.data.batches import Batch
from lftpipe.flow.distillation import (
    chunked_loss,
    draw,
    full_divergence,
    next_token_loss,
    sampled_divergence,
    top_divergence,
)
from lftpipe.flow.objective import ErrorScale, Loss, branch_matching, flow_matching, flow_walking
from lftpipe.flow.part import LayerStack, NoLayer, PartSequence
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath, States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail

# --- What a student's next-token distributions lack of the teacher's, both through the frozen tail.
#
# The tail's layers run once over a whole batch. The head's logits are many times larger than the states
# they are made of, so they are made for some positions at a time, with their gradient, and forgotten.

#: Bytes of logits in float32 that are made at a time, by the kind of device: enough positions for a product
#: with the head. What is summed of them goes through the cache row by row (`flow/distillation.py`).
PIECE_BYTES = {"cpu": 2**27}
OTHERWISE = 2**29

#: Bytes of the teacher's logits of a batch, at most, that are kept for other runs to compare with.
KEPT_BYTES = 2**30

Positions = Float[Tensor, "position feature"]


@dataclass
class FrozenTails:
    """The tails that the runs of one command compare through, each loaded once."""

    _loaded: dict[tuple[int, torch.dtype, torch.device], Tail] = field(default_factory=dict)

    def get(self, teacher: Teacher, start: int, dtype: torch.dtype, device: torch.device) -> Tail:
        """From `h[start]` to the logits."""
        key = (start, dtype, device)
        if key not in self._loaded:
            tail = Tail(teacher, start)
            cast_linear(tail, dtype)
            _ = tail.linear_head  # what it is, is found by its values: better before a GPU has them
            self._loaded[key] = tail.to(device)
        return self._loaded[key]


def check_head(tail: Tail, teacher: Teacher) -> None:
    """Refuse a head of which single tokens' logits cannot be had.

    Raises
    ------
    TeacherError
        If the head is more than a linear map.
    """
    if tail.linear_head is None:
        raise TeacherError(
            f"the term sampled-logits on {teacher.model}, whose head is more than a linear map",
            "a head without soft-cap or scale",
            "use the term top-logits",
        )


def logit_divergence(tail: Tail, student: States, batch: Batch) -> Loss:
    """KL(teacher || student) over the whole vocabulary, in nats, mean over positions.

    Parameters
    ----------
    student
        What the head reads.
    batch
        The teacher's: its last states, if the store has them, else those at the tail's start.
    """
    with torch.no_grad():
        last = tail.start + len(tail.layers)
        begin = last if last in batch.states else tail.start
        teacher = tail.states(batch.states[begin], batch.context, start=begin, stop=last)
        teacher = tail.norm(teacher).flatten(0, 1)

    def divergence(piece: Positions, part: slice) -> Loss:
        key = (begin, next(tail.head.parameters()).dtype, part.start)
        return full_divergence(_teacher_logits(tail, teacher, batch, part, key), tail.head(piece))

    return _over_pieces(student, divergence, tail.vocabulary)


def top_logit_divergence(tail: Tail, student: States, batch: Batch) -> Loss:
    """A lower bound of the same, from the teacher's largest logits."""
    assert batch.logits is not None
    values, ids, normaliser = (tensor.flatten(0, 1) for tensor in batch.logits)

    def divergence(piece: Positions, part: slice) -> Loss:
        return top_divergence(values[part], ids[part], normaliser[part], tail.head(piece))

    return _over_pieces(student, divergence, tail.vocabulary)


def sampled_logit_divergence(tail: Tail, student: States, batch: Batch) -> Loss:
    """The same with the student's sum over the other tokens estimated from a sample: no whole head.

    Parameters
    ----------
    batch
        The teacher's, with `logits`; its number is the draw's seed.
    """
    assert batch.logits is not None
    assert tail.linear_head is not None
    weight, bias = tail.linear_head.weight, tail.linear_head.bias
    values, ids, normaliser = (tensor.flatten(0, 1) for tensor in batch.logits)
    drawn = draw(ids, tail.vocabulary, batch.step)

    def divergence(piece: Positions, part: slice) -> Loss:
        return sampled_divergence(values[part], ids[part], normaliser[part], piece, weight, bias, drawn)

    return _over_pieces(student, divergence, ids.shape[1] * weight.shape[1])


def token_loss(tail: Tail, student: States, batch: Batch) -> Loss:
    """Cross-entropy of the text's own next tokens, in nats, divided by all positions."""
    following = batch.tokens.roll(-1, dims=1).flatten()
    known = ~batch.first_of_segment.roll(-1, dims=1)
    known[:, -1] = False
    targets = known.flatten()

    def entropy(piece: Positions, part: slice) -> Loss:
        return next_token_loss(following[part], targets[part], tail.head(piece))

    return _over_pieces(student, entropy, tail.vocabulary)


def _teacher_logits(tail: Tail, normed: Positions, batch: Batch, part: slice, key: tuple[Any, ...]) -> Tensor:
    """Of some positions; kept with the batch where other runs ask for them too."""
    if key in batch.kept:
        return batch.kept[key]
    with torch.no_grad():
        logits = tail.head(normed[part])
    if batch.num_consumers > 1 and len(normed) * logits.shape[-1] * logits.element_size() <= KEPT_BYTES:
        batch.kept[key] = logits
    return logits


def _over_pieces(student: States, compare: Callable[[Positions, slice], Loss], numbers: int) -> Loss:
    """The mean of a comparison over all positions, as many at a time as the device computes well.

    Parameters
    ----------
    compare
        The mean loss of a slice of positions from what the head reads there.
    numbers
        That it makes of each position.
    """
    size = max(1, PIECE_BYTES.get(student.device.type, OTHERWISE) // (4 * numbers))
    return chunked_loss(student.flatten(0, 1), compare, size)


# --- The terms of a loss on one batch: what several of them need is computed once.


@dataclass(frozen=True)
class LogitsProblem(ABC):
    """One batch seen by a student: what the terms on next-token distributions look at."""

    batch: Batch
    x_0: States
    tail: Tail | None
    """Frozen, to the logits; None where no term reads any."""

    @cached_property
    @abstractmethod
    def end(self) -> States:
        """What is made of `x_0`."""

    @cached_property
    def head_input(self) -> States:
        """What the head reads of it."""
        assert self.tail is not None
        return self.tail.head_input(self.end, self.batch.context)


@dataclass(frozen=True)
class Problem(LogitsProblem):
    """One batch seen by one flow layer, with every random draw of the step."""

    flow: Velocity | LayerStack | NoLayer
    block: tuple[int, int]
    t: Times
    time_grid: Float[Tensor, "time sequence"]
    method: Method
    scale: ErrorScale

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
    @override
    def end(self) -> States:
        """Where the walk from `x_0` along the time grid ends."""
        return ODESolver(self.velocity).sample(self.x_0, method=self.method, time_grid=self.time_grid)


@dataclass(frozen=True)
class SequenceProblem(LogitsProblem):
    """One batch seen by a student of several parts: terms on states are sums over the parts.

    Next-token distributions are the whole student's: they are compared at the end of the last part, and teach
    the others from there.
    """

    flow: PartSequence
    of_part: Callable[[int, States | None], Problem]
    """The problem of one part that begins at some states, or at its own cached `h[m]`."""

    def of_parts(self, term: str) -> Sequence[Problem]:
        """The problems over which a term is summed."""
        return self.alone if term == "local" else self.chained

    @cached_property
    def alone(self) -> Sequence[Problem]:
        """Of every part from its own cached state: none runs through another."""
        return [self.of_part(number, None) for number in range(len(self.flow.parts))]

    @cached_property
    def chained(self) -> Sequence[Problem]:
        """Of every part from the end of the one before, through the teacher's layers between the two."""
        found: list[Problem] = []
        for number in range(len(self.flow.parts)):
            x = self.flow.enter(number, found[-1].end if found else self.x_0, self.batch.context)
            found.append(self.of_part(number, x))
        return found

    @cached_property
    @override
    def end(self) -> States:
        """Where the last part ends."""
        return self.chained[-1].end


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


def _on_logits(measure: Callable[[Tail, States, Batch], Loss]) -> Callable[[LogitsProblem], Loss]:
    def term(problem: LogitsProblem) -> Loss:
        assert problem.tail is not None
        return measure(problem.tail, problem.head_input, problem.batch)

    return term


#: What computes the terms of `lftpipe.config.loss.TERMS`; regression is a walk of one step without time.
TERMS: dict[str, Callable[[Any], Loss]] = {
    "fw": _fw,
    "regression": _fw,
    "local": _fw,
    "sfm": _sfm,
    "trajectory": _trajectory,
    "branches": _branches,
    "logits": _on_logits(logit_divergence),
    "top-logits": _on_logits(top_logit_divergence),
    "sampled-logits": _on_logits(sampled_logit_divergence),
    "tokens": _on_logits(token_loss),
}


def weighted_sum(problem: LogitsProblem, weights: dict[str, float]) -> Loss:
    """The terms of one stage, each times its weight.

    Parameters
    ----------
    problem
        On which they are computed.
    weights
        By the name of the term.
    """
    return sum((weight * _term(name, problem) for name, weight in weights.items()), problem.x_0.new_zeros(()))


def _term(name: str, problem: LogitsProblem) -> Loss:
    """One term; of one from outside it is checked what it gives."""
    if isinstance(problem, SequenceProblem) and name not in ON_LOGITS:
        return torch.stack([_term(name, one) for one in problem.of_parts(name)]).sum()
    if name in TERMS:
        return TERMS[name](problem)
    value: Any = load_term(name)(problem)
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        what = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise SettingsError(
            f"the term {name!r}, which gives {what}", "a scalar", "take the mean over positions"
        )
    return value
