"""The metrics of Table 1 (section 5.1), summed over batches in float64."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lftpipe.base.device import in_float64, move


class StateMetrics:
    """NMSE with and without first positions, and KL between softmaxes over the feature axis.

    What is added is summed where it is computed: nobody waits for it until it is read.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sums: Float64[Tensor, 5] | None = None

    def add(
        self,
        predicted: Float[Tensor, "sequence position feature"],
        x_1: Float[Tensor, "sequence position feature"],
        first: Bool[Tensor, "sequence position"],
    ) -> None:
        """Add a batch; `first` marks each segment's first position, where massive activations sit.

        `predicted`, `x_1`: what a student predicts, and the teacher's states.
        """
        error = in_float64((predicted - x_1).float().square().sum(-1))
        energy = in_float64(x_1.float().square().sum(-1))
        elsewhere = ~first.to(error.device)
        at_first = (each.masked_fill(elsewhere, 0).sum() for each in (error, energy))
        kl = in_float64(kl_divergence(x_1, predicted)).sum()
        sums = torch.stack([error.sum(), energy.sum(), *at_first, kl])
        self._sums = sums if self._sums is None else self._sums + sums
        self.num_tokens += error.numel()

    def read(self) -> list[float]:
        """Squares of error and target, the same of first positions, KL."""
        return [0.0] * 5 if self._sums is None else self._sums.tolist()

    @property
    def nmse(self) -> float:
        """`E||x^_1 - x_1||^2 / E||x_1||^2`."""
        error, energy, *_ = self.read()
        return error / energy

    @property
    def nmse_without_first(self) -> float:
        """NMSE over all positions but each segment's first."""
        error, energy, error_first, energy_first, _ = self.read()
        return (error - error_first) / (energy - energy_first)

    @property
    def kl_latent(self) -> float:
        """KL(softmax x_1 || softmax x^_1), nats, mean over tokens."""
        return self.read()[-1] / self.num_tokens


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


class NextTokens(NamedTuple):
    """What comes after every position of a batch, flat."""

    ids: Int[Tensor, " token"]
    counted: Bool[Tensor, " token"]
    """Whether it is a target: a token that starts a segment, or is not there, is none."""
    document: np.ndarray
    """Number of the document of each position, which is known without a look at the device."""

    @staticmethod
    def of(
        tokens: Int[Tensor, "sequence position"],
        first: Bool[Tensor, "sequence position"],
        document: np.ndarray | None = None,
    ) -> "NextTokens":
        """Of a batch.

        `first`: which positions are the first of their segment: nothing before them was seen.
        `document`: the number of each token's document; left out, all are one.
        """
        number = np.zeros(tokens.shape, np.int64) if document is None else document
        last = torch.ones_like(first[:, :1])
        counted = ~torch.cat([first[:, 1:], last], dim=1)
        return NextTokens(tokens.long().roll(-1, dims=1).flatten(), counted.flatten(), number.ravel())

    def part(self, rows: slice) -> "NextTokens":
        """At some of the positions."""
        return NextTokens(self.ids[rows], self.counted[rows], self.document[rows])


class LogitMetrics:
    """KL of next-token distributions, perplexity, and how often both have the same likeliest token.

    What is added is summed by document where it is computed: nobody waits for it until it is read.
    """

    def __init__(self) -> None:
        self._documents: list[np.ndarray] = []
        self._sums: list[Float64[Tensor, "document 6"]] = []

    def add(
        self, student: Float[Tensor, "token vocabulary"], teacher: Reference, following: NextTokens
    ) -> None:
        """Add some positions."""
        # Autocast would take the products' sums in bfloat16.
        with torch.autocast(student.device.type, enabled=False):
            log = student.float().log_softmax(-1)
            kl = teacher.negative_entropy - torch.linalg.vecdot(teacher.probability, log)
        picked = log.gather(-1, following.ids[:, None]).squeeze(-1).masked_fill(~following.counted, 0)
        agrees = student.max(-1).indices == teacher.likeliest
        columns = (kl, torch.ones_like(kl), -picked, following.counted, agrees, teacher.negative_entropy)
        each = torch.stack([in_float64(column) for column in columns], dim=1)
        documents, place = np.unique(following.document, return_inverse=True)
        sums = each.new_zeros(len(documents), len(columns))
        self._documents.append(documents)
        self._sums.append(sums.index_add_(0, move(torch.from_numpy(place), each.device), each))

    def by_document(self) -> Float64[np.ndarray, "4 document"]:
        """Sums of KL, positions, nats and targets, in the order of the documents' numbers."""
        return self._read()[:4]

    @property
    def num_documents(self) -> int:
        """How many of them there are."""
        return self._read().shape[1]

    @property
    def num_tokens(self) -> int:
        """Positions that were added."""
        return int(self._total(1))

    @property
    def kl(self) -> float:
        """KL(teacher || student), nats per token."""
        return self._total(0) / self._total(1)

    @property
    def agreement(self) -> float:
        """Fraction of positions whose most likely token is the teacher's."""
        return self._total(4) / self._total(1)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean nats per predicted token; infinite if that overflows."""
        return self.perplexity_per(int(self._total(3)))

    def perplexity_per(self, count: int) -> float:
        """`exp` of the nats over so many words, bytes or tokens of the same text."""
        return float(torch.tensor(self._total(2) / max(count, 1), dtype=torch.float64).exp())

    @property
    def of_finite_teacher(self) -> bool:
        """Whether all that was compared with is numbers."""
        return math.isfinite(self._total(5))

    def _total(self, column: int) -> float:
        return float(self._read()[column].sum())

    def _read(self) -> Float64[np.ndarray, "6 document"]:
        """All sums, with the documents' parts added up."""
        if not self._sums:
            return np.zeros((6, 0))
        if len(self._sums) > 1:
            documents, place = np.unique(np.concatenate(self._documents), return_inverse=True)
            parts = torch.cat(self._sums)
            sums = parts.new_zeros(len(documents), 6)
            self._sums = [sums.index_add_(0, move(torch.from_numpy(place), parts.device), parts).cpu()]
            self._documents = [documents]
        return self._sums[0].cpu().numpy().T


def kl_divergence(
    p_logits: Float[Tensor, "*batch feature"], q_logits: Float[Tensor, "*batch feature"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax p || softmax q) over the last axis, in nats."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
