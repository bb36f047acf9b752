"""The recoupling map, and the sweep that asks whether it predicts, as JSON."""

import dataclasses
import json
from typing import Any, ClassVar

from pydantic import with_config
from typing_extensions import TypedDict

from lftpipe.base.errors import LftpipeError, SettingsError
from lftpipe.results.base import Artefact, OrAbsent, require

# --- `recoupling.json`: the map over all pairs of states (docs/recoupling.md describes it).

#: A figure of all pairs of states, `[m][n]`, None where `m >= n`.
Matrix = list[list[float | None]]

#: Figures that every map has.
FIGURES = (
    "ratio",
    "ratio_raw",
    "ratio_stderr",
    "transport_cost",
    "identity_cost",
    "random_cost",
    "relative_gap",
    "relative_displacement",
)


@with_config({"extra": "allow", "strict": True})
class MapSettings(TypedDict):
    """What of `recouple`'s settings is read again; the file has all of them."""

    tokens: int
    batches: int
    metric: str
    standardise: bool
    skip_first: bool
    rank_by: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Artefact):
    """All blocks of one length, the best first."""

    length: int
    fraction: float
    """Of the teacher's layers."""
    blocks: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecouplingMap(Artefact):
    """The recoupling ratio and its kin of all pairs of states, and how they were drawn."""

    NAME: ClassVar[str] = "a recoupling map"
    CURE: ClassVar[str] = "run `lftpipe recouple --force`"
    ERROR: ClassVar[type[LftpipeError]] = SettingsError  # `--out` or `--store` led here
    layers: list[int]
    ratio: Matrix
    ratio_raw: Matrix
    ratio_stderr: Matrix
    transport_cost: Matrix
    identity_cost: Matrix
    random_cost: Matrix
    relative_gap: Matrix
    relative_displacement: Matrix
    influence: Matrix
    """One minus the mean cosine."""
    partners: list[list[list[int] | None]]
    """Of the first batch: `partners[m][n][i]` is where token `i` goes."""
    samples: list[list[list[int]]]
    """Of each batch, `[sequence, position]` of `train`."""
    teacher: str | None
    num_layers: int
    approximate: bool
    solver: str
    lftpipe: str
    settings: MapSettings
    store_fingerprint: str
    probe_residual: OrAbsent[Matrix] = None
    """A linear map's residual, if blocks are ranked by it."""
    ranking: list[Ranked]

    def text(self, value: dict[str, Any]) -> str:
        """One key a line: readable, and a small file."""
        lines = (f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in value.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def check(self) -> None:
        """Layers ascend; every figure is a square with numbers above its diagonal, and nothing else."""
        layers, size = self.layers, len(self.layers)
        require(size >= 2 and layers == sorted(set(layers)) and layers[0] >= 0, "layers do not ascend")
        require(layers[-1] <= self.num_layers, "layers has more than num_layers")
        for name in (*FIGURES, "influence", "probe_residual"):
            matrix = getattr(self, name)
            if matrix is not None:
                _check_square(name, matrix, size, optional=name == "ratio_stderr")
        _check_square("partners", self.partners, size, optional=False)
        pairs = (len(pair) == 2 and min(pair) >= 0 for batch in self.samples for pair in batch)
        require(all(pairs), "samples are not pairs of sequence and position")
        tokens = self.settings["tokens"]
        for row in self.partners:
            for plan in row:
                whole = plan is None or (len(plan) == tokens and min(plan) >= 0 and max(plan) < tokens)
                require(whole, f"partners has a plan that is none of {tokens} tokens")
        for ranked in self.ranking:
            for m, n in ranked.blocks:
                known = m in layers and n in layers and n - m == ranked.length > 0
                require(known, f"ranking: {m}:{n} is no block of {ranked.length} on the map")


def _check_square(name: str, matrix: list[list[Any]], size: int, *, optional: bool) -> None:
    require(len(matrix) == size and all(len(row) == size for row in matrix), f"{name} is not {size} x {size}")
    for m, row in enumerate(matrix):
        for n, entry in enumerate(row):
            filled = entry is not None
            require(filled == (m < n) or (optional and not filled), f"{name}.{m}.{n} is out of place")


# --- `sweep.json` and `toy.json`: what every block of some lengths reached; what every toy panel kept.


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
