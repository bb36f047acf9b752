"""Losses on next-token distributions: KL(teacher || student), or a bound of it from the largest logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lftpipe.flow.objective import Loss

Logits = Float[Tensor, "*batch vocabulary"]


def full_divergence(teacher: Logits, student: Logits) -> Loss:
    """KL(teacher || student) over the whole vocabulary, in nats, mean over positions.

    Parameters
    ----------
    teacher, student
        Logits.
    """
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


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
    values, ids
        The teacher's largest logits and their tokens.
    normaliser
        Log of the sum of exponentials over the teacher's whole vocabulary.
    student
        The student's logits.
    """
    student = student.float()
    log_p = values.float() - normaliser.float()[..., None]
    log_q = student.gather(-1, ids.long()) - student.logsumexp(-1, keepdim=True)
    kept = (log_p.exp() * (log_p - log_q)).sum(-1)
    p_rest, q_rest = (_rest(log) for log in (log_p, log_q))
    return (kept + p_rest * (p_rest.log() - q_rest.log())).mean()


def _rest(log_kept: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """What is left of 1; at least a hair, so that its logarithm is finite."""
    smallest = torch.finfo(torch.float32).eps
    return (1 - log_kept.exp().sum(-1)).clamp_min(smallest)
