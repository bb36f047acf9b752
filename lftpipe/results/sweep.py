"""`sweep.json` and `toy.json`: what every block of some lengths reached; what every toy panel kept."""

import dataclasses
from typing import Any, ClassVar

from lftpipe.results.base import Artefact, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweptRun(Artefact):
    """One run of a block."""

    run: str | None
    seed: int | None
    train_tokens: int | None
    k: int | None
    solver: str | None
    kl: float | None
    nmse: float | None
    nmse_without_first: float | None
    ppl: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweptBlock(Artefact):
    """One block: its predictors, and what its runs reached on average and each."""

    block: str
    length: int
    ratio: float | None
    relative_gap: float | None
    relative_displacement: float | None
    probe_residual: float | None
    influence: float | None
    kl: float
    nmse: float
    nmse_without_first: float
    ppl: float
    runs: list[SweptRun]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlation(Artefact):
    """Spearman's coefficient of a predictor with an outcome; over all blocks if `length` is None."""

    against: str
    predictor: str
    length: int | None
    points: int
    spearman: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(Artefact):
    """The block that a predictor would choose, and its place among those of its length, 1 the best."""

    rank_by: str
    length: int
    block: str
    kl: float
    place: int
    of: int
    best_block: str
    best_kl: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Artefact):
    """Whether the map's figures predict what short runs reach."""

    NAME: ClassVar[str] = "a sweep"
    CURE: ClassVar[str] = "run `lftpipe sweep --force`"

    teacher: str
    store_fingerprint: str
    lengths: list[int]
    validation_tokens: int
    map_settings: dict[str, Any]
    settings: dict[str, Any]
    lftpipe: str
    rows: list[SweptBlock]
    correlations: list[Correlation]
    choices: list[Choice]

    def check(self) -> None:
        """Every length has blocks, every correlation belongs to one of them."""
        require(bool(self.rows) and bool(self.lengths), "rows or lengths is empty")
        require({row.length for row in self.rows} == set(self.lengths), "rows and lengths disagree")
        known = {None, *self.lengths}
        require({entry.length for entry in self.correlations} <= known, "correlations has another length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel(Artefact):
    """One objective of figure 3."""

    panel: str
    k: int
    solver: str
    pairs_kept: float
    nmse: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Artefact):
    """Figure 3: the fraction of pairs that each objective keeps."""

    NAME: ClassVar[str] = "the toy's results"
    CURE: ClassVar[str] = "run `lftpipe toy --force`"

    seed: int
    steps: int
    panels: list[Panel]
