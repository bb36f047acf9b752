"""A next-token loss without most of the head: the teacher's likely tokens, and a sample of the others.

The logits of a whole vocabulary are most of what a loss on them costs. KL(teacher || student) with all tokens
but the teacher's largest taken as one needs of the student the logits of those tokens, and the sum of
exponentials over the rest. That sum is estimated by importance sampling (Bengio & Senecal, 2008).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lftpipe.flow.distillation import lumped_divergence
from lftpipe.flow.objective import Loss

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
    """Where in `ids` a token is; -1 for those that were not drawn."""


def draw(ids: Int[Tensor, "*batch rank"], vocabulary: int, seed: int, draws: int = DRAWS) -> Drawn:
    """Draw tokens, often those that are likely somewhere in the batch."""
    counts = torch.bincount(ids.flatten().long(), minlength=vocabulary).float()
    probability = (1 - UNIFORM) * counts / counts.sum() + UNIFORM / vocabulary
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    drawn = torch.multinomial(probability, draws, replacement=True, generator=generator)
    unique, times = drawn.unique(return_counts=True)
    slot = torch.full((vocabulary,), -1, dtype=torch.long, device=ids.device)
    slot[unique] = torch.arange(len(unique), device=ids.device)
    return Drawn(unique, (times / (draws * probability[unique])).log(), slot)


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

    The sum of exponentials is estimated without bias; its logarithm, and so the loss, is slightly low.

    Parameters
    ----------
    normaliser
        Log of the sum of exponentials over the teacher's whole vocabulary.
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
