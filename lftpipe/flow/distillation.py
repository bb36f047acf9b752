"""Losses on next-token distributions: KL(teacher || student), or a bound of it from the largest logits."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lftpipe.flow import by_rows
from lftpipe.flow.objective import Loss

Logits = Float[Tensor, "*batch vocabulary"]


def full_divergence(teacher: Logits, student: Logits) -> Loss:
    """KL(teacher || student) over the whole vocabulary, in nats, mean over positions."""
    return by_rows.divergence(teacher.flatten(0, -2), student.flatten(0, -2)).mean()


def top_divergence(
    values: Float[Tensor, "*batch rank"],
    ids: Int[Tensor, "*batch rank"],
    normaliser: Float[Tensor, "*batch"],
    student: Logits,
) -> Loss:
    """KL between the two distributions with all tokens but the teacher's largest taken as one.

    Lumping outcomes together never raises a KL: it is a lower bound of `full_divergence`, and equal
    to it where all tokens are kept.

    Parameters
    ----------
    normaliser
        Log of the sum of exponentials over the teacher's whole vocabulary.
    """
    log_p = values.float() - normaliser.float()[..., None]
    return lumped_divergence(log_p, student.gather(-1, ids.long()).float() - _logsumexp(student)[..., None])


def _logsumexp(logits: Logits) -> Float[Tensor, "*batch"]:
    return by_rows.logsumexp(logits.flatten(0, -2)).view(logits.shape[:-1])


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

    Parameters
    ----------
    targets
        Positions that a token follows which they can know of.
    """
    losses = _logsumexp(student) - student.gather(-1, tokens[..., None])[..., 0].float()
    return (losses * targets).mean()


def by_pieces(
    states: Float[Tensor, "position feature"],
    compare: Callable[[Float[Tensor, "piece feature"], slice], Loss],
    positions: int,
) -> Loss:
    """A mean over positions of a loss on logits, without the logits of more than some of them at once.

    The gradient with regard to the states is taken piece by piece together with the loss, so the products
    with the head are computed once forward and once backward, and one piece is held. The head is not trained.

    Parameters
    ----------
    compare
        The mean loss of the positions of a slice, from their states.
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
    carried = (states * gradient).sum()
    return total + (carried - carried.detach())
