"""Divergences of next-token distributions: whole, on the top logits, sampled; in chunks of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from lftpipe.base.device import move
from lftpipe.flow.objective import Loss

# --- Sums over a large vocabulary, a few positions at a time, together with their gradients.
#
# Written out in torch, a divergence of logits goes through memory a dozen times. Here a few rows go
# through all of it while they are in the processor's cache, and what is left is the gradient.

#: Numbers of a piece that stays in a processor's cache; a GPU takes all rows at once.
TILE = 2**18

RowLogits = Float[Tensor, "position vocabulary"]
Sums = Float[Tensor, "position"]


def divergence(teacher: RowLogits, student: RowLogits) -> Sums:
    """KL(teacher || student) of every position, in nats. The teacher gets no gradient."""
    return _Divergence.apply(teacher, student)


def logsumexp(logits: RowLogits) -> Sums:
    """Of every position, in float32."""
    return _LogSumExp.apply(logits)


def _tiles(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    size = max(1, TILE // vocabulary) if logits.device.type == "cpu" else max(1, rows)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class _Divergence(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, teacher: Tensor, student: Tensor) -> Tensor:
        found = torch.empty(len(student), device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        with torch.autocast(student.device.type, enabled=False):  # it would sum in bfloat16
            for part in _tiles(student):
                log_p = teacher[part].log_softmax(-1, dtype=torch.float32)
                log_q = student[part].log_softmax(-1, dtype=torch.float32)
                p = log_p.exp()
                found[part] = torch.linalg.vecdot(p, log_p.sub_(log_q))
                if gradient is not None:
                    gradient[part] = log_q.exp_().sub_(p)
        ctx.gradient = gradient
        return found

    @staticmethod
    @override
    def backward(ctx: Any, *given: Any) -> tuple[None, Tensor]:
        return None, _scaled(ctx, given[0])


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        found = torch.empty(len(logits), device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        for part in _tiles(logits):
            tile = logits[part].float()
            found[part] = total = tile.logsumexp(-1)
            if gradient is not None:
                gradient[part] = tile.sub(total[:, None]).exp_()
        ctx.gradient = gradient
        return found

    @staticmethod
    @override
    def backward(ctx: Any, *given: Any) -> Tensor:
        return _scaled(ctx, given[0])


def _scaled(ctx: Any, given: Sums) -> RowLogits:
    """What was kept of the forward pass, once: it is as large as the logits, and is scaled where it lies."""
    gradient, ctx.gradient = ctx.gradient, None
    return gradient.mul_(given[:, None])


# --- Losses on next-token distributions: KL(teacher || student), or a bound of it from the largest logits.

Logits = Float[Tensor, "*batch vocabulary"]


def full_divergence(teacher: Logits, student: Logits) -> Loss:
    """KL(teacher || student) over the whole vocabulary, in nats, mean over positions."""
    return divergence(teacher.flatten(0, -2), student.flatten(0, -2)).mean()


def top_divergence(
    values: Float[Tensor, "*batch rank"],
    ids: Int[Tensor, "*batch rank"],
    normaliser: Float[Tensor, "*batch"],
    student: Logits,
) -> Loss:
    """KL between the two distributions with all tokens but the teacher's largest taken as one.

    Lumping outcomes together never raises a KL: it is a lower bound of `full_divergence`, and equal
    to it where all tokens are kept.

    `normaliser`: log of the sum of exponentials over the teacher's whole vocabulary.
    """
    log_p = values.float() - normaliser.float()[..., None]
    return lumped_divergence(log_p, student.gather(-1, ids.long()).float() - _logsumexp(student)[..., None])


def _logsumexp(logits: Logits) -> Float[Tensor, "*batch"]:
    return logsumexp(logits.flatten(0, -2)).view(logits.shape[:-1])


def lumped_divergence(log_p: Float[Tensor, "*batch rank"], log_q: Float[Tensor, "*batch rank"]) -> Loss:
    """KL of two distributions of which some outcomes are known and the others taken as one."""
    kept = (log_p.exp() * (log_p - log_q)).sum(-1)
    p_rest, q_rest = (_rest(log) for log in (log_p, log_q))
    return (kept + p_rest * (p_rest.log() - q_rest.log())).mean()


def _rest(log_kept: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """What is left of 1; at least a hair, so that its logarithm is finite."""
    smallest = torch.finfo(torch.float32).eps
    return (1 - log_kept.exp().sum(-1)).clamp_min(smallest)


def next_token_loss(tokens: Int[Tensor, "*batch"], targets: Bool[Tensor, "*batch"], student: Logits) -> Loss:
    """Cross-entropy of the tokens that come next, in nats, summed over targets and divided by all positions.

    `targets`: positions that a token follows which they can know of.
    """
    losses = _logsumexp(student) - student.gather(-1, tokens[..., None])[..., 0].float()
    return (losses * targets).mean()


def chunked_loss(
    states: Float[Tensor, "position feature"],
    compare: Callable[[Float[Tensor, "piece feature"], slice], Loss],
    positions: int,
) -> Loss:
    """A mean over positions of a loss on logits, without the logits of more than some of them at once.

    The gradient with regard to the states is taken piece by piece together with the loss, so the products
    with the head are computed once forward and once backward, and one piece is held. The head is not trained.

    `compare`: the mean loss of the positions of a slice, from their states.
    """
    learns = torch.is_grad_enabled() and states.requires_grad
    leaf = states.detach()
    total = states.new_zeros((), dtype=torch.float32)
    gradient = torch.zeros_like(leaf) if learns else None
    for start in range(0, len(states), positions):
        part = slice(start, min(start + positions, len(states)))
        piece = leaf[part].requires_grad_(learns)
        loss = compare(piece, part) * ((part.stop - part.start) / len(states))
        total += loss.detach()
        if gradient is not None:
            (gradient[part],) = torch.autograd.grad(loss, piece)
    if gradient is None:
        return total
    # The graphs of the pieces are gone by now. A product with their gradient, minus its own value, adds
    # nothing to the loss and hands exactly that gradient to the states (a straight-through gradient).
    carried = (states * gradient).sum()
    return total + (carried - carried.detach())


# --- A next-token loss without most of the head: the teacher's likely tokens, and a sample of the others.
#
# The logits of a whole vocabulary are most of what a loss on them costs. KL(teacher || student) with all
# tokens but the teacher's largest taken as one needs of the student the logits of those tokens, and the
# sum of exponentials over the rest. That sum is estimated by importance sampling (Bengio & Senecal, 2008).

#: Tokens drawn for a batch. The estimate's relative error falls with the root of it.
DRAWS = 1024

#: Of the proposal, the part that is equal for all tokens: none is impossible.
UNIFORM = 0.5


@dataclass(frozen=True)
class Drawn:
    """Tokens that stand for the whole vocabulary, each once."""

    ids: Int[Tensor, "drawn"]
    log_weight: Float[Tensor, "drawn"]
    """Log of how many tokens each stands for: its draws over (all draws times its probability)."""
    slot: Int[Tensor, "vocabulary"]
    """Where in `ids` a token is; -1 for those that were not drawn. Behind the last one `ids` has weight 0."""


def draw(ids: Int[Tensor, "*batch rank"], vocabulary: int, seed: int, draws: int = DRAWS) -> Drawn:
    """Draw tokens, often those that are likely somewhere in the batch."""
    tokens = ids.flatten().long()
    counts = torch.zeros(vocabulary, device=ids.device).index_add_(0, tokens, torch.ones_like(tokens).float())
    edges = ((1 - UNIFORM) * counts / counts.sum() + UNIFORM / vocabulary).cumsum(0)
    places = torch.rand(draws, generator=torch.Generator().manual_seed(seed))
    drawn = torch.searchsorted(edges, move(places, ids.device) * edges[-1], right=True)
    drawn = drawn.clamp_max(vocabulary - 1).sort().values
    # Each token once, in order, in arrays of a known size: nobody waits to learn how many there are.
    which = torch.cat([drawn.new_zeros(1), (drawn[1:] != drawn[:-1]).long().cumsum(0)])
    once = torch.zeros_like(drawn).scatter_(0, which, drawn)
    times = torch.zeros(draws, device=ids.device).index_add_(0, which, torch.ones_like(which).float())
    probability = edges.diff(prepend=edges.new_zeros(1)) / edges[-1]
    slot = torch.full((vocabulary,), -1, dtype=torch.long, device=ids.device).scatter_(0, drawn, which)
    used = int(which[-1]) + 1 if ids.device.type == "cpu" else draws  # a processor spares itself the rest
    return Drawn(once[:used], (times / (draws * probability[once])).log()[:used], slot)


def sampled_divergence(
    values: Float[Tensor, "position rank"],
    ids: Int[Tensor, "position rank"],
    normaliser: Float[Tensor, "position"],
    states: Float[Tensor, "position feature"],
    weight: Float[Tensor, "vocabulary feature"],
    bias: Float[Tensor, "vocabulary"] | None,
    drawn: Drawn,
) -> Loss:
    """`top_divergence` in nats, mean over positions, with the student's normaliser estimated.

    The sum of exponentials is estimated without bias, the loss is not: near the teacher it is slightly high.
    It is convex in that sum where the teacher leaves the other tokens more than the square of the student.

    `normaliser`: log of the sum of exponentials over the teacher's whole vocabulary.
    """
    ids = ids.long()
    kept = torch.bmm(weight[ids], states[:, :, None])[:, :, 0].float()
    others = (states @ weight[drawn.ids].T).float()
    if bias is not None:
        kept, others = kept + bias[ids], others + bias[drawn.ids]
    others = (others + drawn.log_weight).masked_fill(_kept_too(ids, drawn), -torch.inf)
    log_sum = torch.cat([kept, others], dim=1).logsumexp(1, keepdim=True)
    log_p = values.float() - normaliser.float()[:, None]
    return lumped_divergence(log_p, kept - log_sum)


def _kept_too(ids: Int[Tensor, "position rank"], drawn: Drawn) -> Bool[Tensor, "position drawn"]:
    """Which of the drawn tokens are among a position's own, and counted there."""
    slots = drawn.slot[ids]
    columns = len(drawn.ids)
    mask = torch.zeros(len(ids), columns + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(1, slots.where(slots >= 0, columns), value=True)
    return mask[:, :columns]
