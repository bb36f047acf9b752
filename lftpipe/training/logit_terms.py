"""What a student's next-token distributions lack of the teacher's, both through the frozen tail.

The tail's layers run once over a whole batch. The head's logits are many times larger than the states they
are made of, so they are made for some positions at a time, with their gradient, and forgotten.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lftpipe.batch import Batch
from lftpipe.device import cast_linear
from lftpipe.errors import TeacherError
from lftpipe.flow.distillation import by_pieces, full_divergence, top_divergence
from lftpipe.flow.objective import Loss
from lftpipe.flow.path import States
from lftpipe.flow.sampled_softmax import draw, sampled_divergence
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail

#: Bytes of logits in float32 that are made at a time, by the kind of device: enough positions for a product
#: with the head. What is summed of them goes through the cache row by row (`flow/by_rows.py`).
PIECE_BYTES = {"cpu": 2**27}
OTHERWISE = 2**29

#: Bytes of the teacher's logits of a batch, at most, that are kept for other runs to compare with.
KEPT_BYTES = 2**30

Positions = Float[Tensor, "position feature"]

#: The mean loss of a slice of positions from what the head reads there, and how many numbers each makes.
Comparison = tuple[Callable[[Positions, slice], Loss], int]


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


def logit_divergence(tail: Tail, end: States, batch: Batch, start: int) -> Loss:
    """KL(teacher || student) over the whole vocabulary, in nats, mean over positions.

    Parameters
    ----------
    batch
        The teacher's: its last states, if the store has them, else those at the block's end.
    """
    with torch.no_grad():
        last = tail.start + len(tail.layers)
        begin = last if last in batch.states else start
        teacher = tail.states(batch.states[begin], batch.context, start=begin, stop=last)
        teacher = tail.norm(teacher).flatten(0, 1)

    def divergence(student: Positions, part: slice) -> Loss:
        key = (begin, next(tail.head.parameters()).dtype, part.start)
        return full_divergence(_teacher_logits(tail, teacher, batch, part, key), tail.head(student))

    return _over_positions(tail, end, batch, start, (divergence, tail.vocabulary))


def top_logit_divergence(tail: Tail, end: States, batch: Batch, start: int) -> Loss:
    """A lower bound of the same, from the teacher's largest logits."""
    return _over_positions(tail, end, batch, start, on_top_logits(tail, batch))


def sampled_logit_divergence(tail: Tail, end: States, batch: Batch, start: int) -> Loss:
    """The same with the student's sum over the other tokens estimated from a sample: no whole head.

    Parameters
    ----------
    batch
        The teacher's, with `logits`; its number is the draw's seed.
    """
    return _over_positions(tail, end, batch, start, on_sampled_logits(tail, batch))


def on_top_logits(tail: Tail, batch: Batch) -> Comparison:
    """How a student is compared with the teacher's largest logits."""
    assert batch.logits is not None
    values, ids, normaliser = (each.flatten(0, 1) for each in batch.logits)

    def divergence(student: Positions, part: slice) -> Loss:
        return top_divergence(values[part], ids[part], normaliser[part], tail.head(student))

    return divergence, tail.vocabulary


def on_sampled_logits(tail: Tail, batch: Batch) -> Comparison:
    """The same, without a product with the whole head.

    Parameters
    ----------
    batch
        The teacher's, with `logits`; its number is the draw's seed.
    """
    assert batch.logits is not None
    assert tail.linear_head is not None
    weight, bias = tail.linear_head.weight, tail.linear_head.bias
    values, ids, normaliser = (each.flatten(0, 1) for each in batch.logits)
    drawn = draw(ids, tail.vocabulary, batch.step)

    def divergence(student: Positions, part: slice) -> Loss:
        return sampled_divergence(values[part], ids[part], normaliser[part], student, weight, bias, drawn)

    return divergence, ids.shape[1] * weight.shape[1]


def _teacher_logits(tail: Tail, normed: Positions, batch: Batch, part: slice, key: tuple[Any, ...]) -> Tensor:
    """Of some positions; kept with the batch where other runs ask for them too."""
    if key in batch.kept:
        return batch.kept[key]
    with torch.no_grad():
        logits = tail.head(normed[part])
    if batch.askers > 1 and len(normed) * logits.shape[-1] * logits.element_size() <= KEPT_BYTES:
        batch.kept[key] = logits
    return logits


def _over_positions(tail: Tail, end: States, batch: Batch, start: int, comparison: Comparison) -> Loss:
    """The mean of a comparison over all positions, some of them at a time."""
    states = tail.states(end, batch.context, start=start)
    return over_pieces(tail.norm(states), comparison)


def over_pieces(states: States, comparison: Comparison) -> Loss:
    """The mean of a comparison over all positions, as many at a time as the device computes well."""
    compare, numbers = comparison
    size = max(1, PIECE_BYTES.get(states.device.type, OTHERWISE) // (4 * numbers))
    return by_pieces(states.flatten(0, 1), compare, size)
