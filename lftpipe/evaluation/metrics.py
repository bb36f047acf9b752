"""The metrics of Table 1 (section 5.1), summed over batches in float64."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor


@dataclass
class StateMetrics:
    """NMSE with and without first positions, and KL between softmaxes over the feature axis."""

    error: float = 0.0
    energy: float = 0.0
    error_first: float = 0.0
    energy_first: float = 0.0
    kl: float = 0.0
    num_tokens: int = 0

    def add(
        self,
        predicted: Float[Tensor, "sequence position feature"],
        x_1: Float[Tensor, "sequence position feature"],
        first: Bool[Tensor, "sequence position"],
    ) -> None:
        """Add a batch; `first` marks each segment's first position, where massive activations sit."""
        error = (predicted - x_1).float().square().sum(-1).double()
        energy = x_1.float().square().sum(-1).double()
        self.error += error.sum().item()
        self.energy += energy.sum().item()
        self.error_first += error[first].sum().item()
        self.energy_first += energy[first].sum().item()
        self.kl += kl_divergence(x_1, predicted).double().sum().item()
        self.num_tokens += error.numel()

    @property
    def nmse(self) -> float:
        """`E||x^_1 - x_1||^2 / E||x_1||^2`."""
        return self.error / self.energy

    @property
    def nmse_without_first(self) -> float:
        """NMSE over all positions but each segment's first."""
        return (self.error - self.error_first) / (self.energy - self.energy_first)

    @property
    def kl_latent(self) -> float:
        """KL(softmax x_1 || softmax x^_1), nats, mean over tokens."""
        return self.kl / self.num_tokens


@dataclass(frozen=True)
class Reference:
    """The teacher's next-token distribution at some positions, ready to compare students with."""

    logits: Float[Tensor, "token vocabulary"]
    probability: Float[Tensor, "token vocabulary"]
    negative_entropy: Float[Tensor, " token"]
    likeliest: Int[Tensor, " token"]

    @staticmethod
    def of(logits: Float[Tensor, "token vocabulary"]) -> "Reference":
        """Of the teacher's logits."""
        with torch.autocast(logits.device.type, enabled=False):
            log = logits.float().log_softmax(-1)
            probability = log.exp()
            entropy = torch.linalg.vecdot(probability, log)
        return Reference(logits, probability, entropy, logits.max(-1).indices)

    @property
    def finite(self) -> bool:
        """Whether all of it is numbers."""
        return bool(self.negative_entropy.isfinite().all())


class NextTokens(NamedTuple):
    """What comes after every position of a batch, flat."""

    ids: Int[Tensor, " token"]
    counted: Bool[Tensor, " token"]
    """Whether it is a target: a token that starts a segment, or is not there, is none."""
    document: Int[Tensor, " token"]
    """Number of the document of each position."""

    @staticmethod
    def of(
        tokens: Int[Tensor, "sequence position"],
        first: Bool[Tensor, "sequence position"],
        document: np.ndarray | None = None,
    ) -> "NextTokens":
        """Of a batch.

        Parameters
        ----------
        first
            Which positions are the first of their segment: nothing before them was seen.
        document
            The number of each token's document; left out, all are one.
        """
        number = torch.zeros_like(tokens) if document is None else torch.from_numpy(document).to(tokens)
        last = torch.ones_like(first[:, :1])
        counted = ~torch.cat([first[:, 1:], last], dim=1)
        return NextTokens(tokens.long().roll(-1, dims=1).flatten(), counted.flatten(), number.flatten())

    def part(self, rows: slice) -> "NextTokens":
        """At some of the positions."""
        return NextTokens(*(each[rows] for each in self))


@dataclass
class LogitMetrics:
    """KL of next-token distributions, perplexity, and how often both have the same likeliest token."""

    kl_sum: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0
    nats: float = 0.0
    num_targets: int = 0
    documents: dict[int, np.ndarray] = field(default_factory=dict, compare=False)
    """By document the sums of KL, positions, nats and targets."""

    def add(
        self, student: Float[Tensor, "token vocabulary"], teacher: Reference, following: NextTokens
    ) -> None:
        """Add some positions."""
        # Autocast would take the products' sums in bfloat16.
        with torch.autocast(student.device.type, enabled=False):
            log = student.float().log_softmax(-1)
            kl = teacher.negative_entropy - torch.linalg.vecdot(teacher.probability, log)
        self.kl_sum += kl.double().sum().item()
        self.num_agreeing += int((student.max(-1).indices == teacher.likeliest).sum().item())
        self.num_tokens += len(student)
        picked = log.gather(-1, following.ids[:, None]).squeeze(-1)
        self.nats -= picked[following.counted].double().sum().item()
        self.num_targets += int(following.counted.sum().item())
        counted = following.counted
        each = torch.stack([kl, torch.ones_like(kl), -picked.where(counted, 0), counted.to(kl)], dim=1)
        numbers, place = following.document.unique(return_inverse=True)
        sums = each.new_zeros(len(numbers), 4, dtype=torch.float64).index_add_(0, place, each.double())
        for number, row in zip(numbers.tolist(), sums.cpu().numpy(), strict=True):
            self.documents[number] = self.documents.get(number, 0) + row

    def by_document(self) -> Float64[np.ndarray, "4 document"]:
        """Sums of KL, positions, nats and targets, in the order of the documents' numbers."""
        return np.stack([self.documents[number] for number in sorted(self.documents)], axis=1)

    @property
    def kl(self) -> float:
        """KL(teacher || student), nats per token."""
        return self.kl_sum / self.num_tokens

    @property
    def agreement(self) -> float:
        """Fraction of positions whose most likely token is the teacher's."""
        return self.num_agreeing / self.num_tokens

    @property
    def perplexity(self) -> float:
        """`exp` of the mean nats per predicted token; infinite if that overflows."""
        return self.perplexity_per(self.num_targets)

    def perplexity_per(self, count: int) -> float:
        """`exp` of the nats over so many words, bytes or tokens of the same text."""
        return float(torch.tensor(self.nats / max(count, 1), dtype=torch.float64).exp())


def kl_divergence(
    p_logits: Float[Tensor, "*batch feature"], q_logits: Float[Tensor, "*batch feature"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax p || softmax q) over the last axis, in nats."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
