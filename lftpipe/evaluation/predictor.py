"""What a predictor is: how a block's start becomes its end, what that costs, and where it comes from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lftpipe import runs
from lftpipe.artefacts.results import JOINED
from lftpipe.batch import Batch
from lftpipe.flow.path import States
from lftpipe.teacher.context import AttentionContext
from lftpipe.teacher.tail import Tail

Predict = Callable[[States, AttentionContext], States]


Block = tuple[int, int]


@dataclass(frozen=True)
class Origin:
    """The run that a predictor was trained in; of several together, what they say jointly."""

    run: str
    objective: str
    seed: int
    train_tokens: int
    weights_digest: str

    @classmethod
    def of(cls, run: runs.Run) -> "Origin":
        """A run's own."""
        return cls(run.path.name, run.objective, run.seed, run.train_tokens, run.weights_digest)

    @classmethod
    def joined(cls, origins: list["Origin"]) -> "Origin":
        """Of a student of several flow layers."""
        return cls(
            run=JOINED.join(each.run for each in origins),
            objective=JOINED.join(dict.fromkeys(each.objective for each in origins)),
            seed=origins[0].seed,
            train_tokens=max(each.train_tokens for each in origins),
            weights_digest=JOINED.join(each.weights_digest for each in origins),
        )


@dataclass
class Evaluations:
    """How often tokens were evaluated whose steps are chosen one by one."""

    threshold: float
    keys_fraction: float
    """What keys and values cost, as a fraction of an evaluation."""
    total: int = 0
    num_tokens: int = 0

    @property
    def mean(self) -> float:
        """Evaluations of a token; NaN before anything was predicted."""
        return self.total / self.num_tokens if self.num_tokens else math.nan

    def mean_with_keys(self, most: int) -> float:
        """`mean`, and the keys and values that a finished token makes until the last step."""
        return self.mean + self.keys_fraction * (most - self.mean)


@dataclass(frozen=True)
class Steps:
    """In how many steps a flow layer is run, and what they cost."""

    k: int
    solver: str
    nfe: int
    chosen: Evaluations | None = None
    """Set where each token takes as many steps as it needs; `k` is then their largest number."""


@dataclass(frozen=True)
class Predictor:
    """How `h[m]` becomes a prediction of `h[n]`, and what that costs.

    Attributes
    ----------
    block
        `(m, n)`; None of the teacher, which predicts nothing.
    parts
        Blocks of a student of several flow layers; `block` then spans them all.
    """

    method: str
    predict: Predict
    parameters: int
    block: Block | None = None
    steps: Steps | None = None
    origin: Origin | None = None
    parts: tuple[str, ...] = field(default=())
    tail: Tail | None = None
    """The layers after the block where they are no longer the teacher's: of a healed run."""
    enter: Callable[[Batch], States] | None = None
    """From a batch to the block's start, where the layers before it are no longer the teacher's."""

    @property
    def block_text(self) -> str | None:
        """As in the table: `m:n`, or several of them."""
        if self.block is None:
            return None
        return ",".join(self.parts) or f"{self.block[0]}:{self.block[1]}"

    @property
    def adaptive(self) -> Evaluations | None:
        """The record of steps that are chosen token by token, if they are."""
        return self.steps.chosen if self.steps else None
