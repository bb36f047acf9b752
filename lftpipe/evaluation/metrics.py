"""The metrics of Table 1 (section 5.1), summed over batches in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
        """Add a batch; `first` marks each segment's first position, where massive activations sit.

        Parameters
        ----------
        predicted
            Predicted states.
        x_1
            The teacher's states.
        first
            Which positions are the first of their segment.
        """
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
    """The teacher's next-token distribution for a batch, ready to compare students with."""

    logits: Float[Tensor, "sequence position vocabulary"]
    probability: Float[Tensor, "sequence position vocabulary"]
    negative_entropy: Float[Tensor, "sequence position"]
    likeliest: Int[Tensor, "sequence position"]

    @staticmethod
    def of(logits: Float[Tensor, "sequence position vocabulary"]) -> "Reference":
        """Of the teacher's logits.

        Parameters
        ----------
        logits
            The teacher's logits.
        """
        log = logits.float().log_softmax(-1)
        probability = log.exp()
        return Reference(logits, probability, (probability * log).sum(-1), logits.argmax(-1))

    @property
    def finite(self) -> bool:
        """Whether all of it is numbers."""
        return bool(self.negative_entropy.isfinite().all())


@dataclass
class LogitMetrics:
    """KL of next-token distributions, perplexity, and how often both have the same likeliest token."""

    kl_sum: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0
    nats: float = 0.0
    num_targets: int = 0

    def add(
        self,
        student: Float[Tensor, "sequence position vocabulary"],
        teacher: Reference,
        tokens: Int[Tensor, "sequence position"],
        first: Bool[Tensor, "sequence position"],
    ) -> None:
        """Add a batch. A token that starts a segment is no target: nothing before it was seen.

        Parameters
        ----------
        student
            Logits of the student.
        teacher
            The teacher's, prepared.
        tokens
            Token ids.
        first
            Which positions are the first of their segment.
        """
        student = student.float()
        # KL = sum p log p - sum p log q with log q = logits - logsumexp: two passes over the vocabulary.
        normaliser = student.logsumexp(-1)
        cross = torch.einsum("spv,spv->sp", teacher.probability, student) - normaliser
        self.kl_sum += (teacher.negative_entropy - cross).double().sum().item()
        self.num_agreeing += int((student.argmax(-1) == teacher.likeliest).sum().item())
        self.num_tokens += tokens.numel()
        targets = ~first[:, 1:]
        picked = student[:, :-1].gather(-1, tokens[:, 1:, None].long()).squeeze(-1) - normaliser[:, :-1]
        self.nats -= picked[targets].double().sum().item()
        self.num_targets += int(targets.sum().item())

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
        return float(torch.tensor(self.nats / max(self.num_targets, 1), dtype=torch.float64).exp())


def kl_divergence(
    p_logits: Float[Tensor, "*batch feature"], q_logits: Float[Tensor, "*batch feature"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax p || softmax q) over the last axis, in nats.

    Parameters
    ----------
    p_logits
        Logits of the distribution that counts.
    q_logits
        Logits of the other.
    """
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
