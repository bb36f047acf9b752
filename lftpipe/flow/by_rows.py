"""Sums over a large vocabulary, a few positions at a time, together with their gradients.

Written out in torch, a divergence of logits goes through memory a dozen times. Here a few rows go through all
of it while they are in the processor's cache, and what is left is the gradient.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

#: Numbers of a piece that stays in a processor's cache; a GPU takes all rows at once.
TILE = 2**18

Logits = Float[Tensor, "position vocabulary"]
Sums = Float[Tensor, "position"]


def divergence(teacher: Logits, student: Logits) -> Sums:
    """KL(teacher || student) of every position, in nats. The teacher gets no gradient."""
    return _Divergence.apply(teacher, student)


def logsumexp(logits: Logits) -> Sums:
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


def _scaled(ctx: Any, given: Sums) -> Logits:
    """What was kept of the forward pass, once: it is as large as the logits, and is scaled where it lies."""
    gradient, ctx.gradient = ctx.gradient, None
    return gradient.mul_(given[:, None])
