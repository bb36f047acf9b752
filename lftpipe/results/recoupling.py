"""`recoupling.json`: the map over all pairs of states (docs/recoupling.md describes it)."""

import dataclasses
import json
from typing import Any, ClassVar

from pydantic import with_config
from typing_extensions import TypedDict

from lftpipe.base.errors import LftpipeError, SettingsError
from lftpipe.results.base import Artefact, OrAbsent, require

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
