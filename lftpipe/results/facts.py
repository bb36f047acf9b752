"""What comes of looking at what is there: verify, info, runs, compare."""

import dataclasses
from typing import Any

from lftpipe.results.base import JsonObject, OrAbsent
from lftpipe.results.outcomes import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class DamagedFile(JsonObject):
    """A file of a store that is not as it was written; array, split and index of a shard's."""

    file: str
    problem: str
    array: str | None
    split: str | None
    index: int | None
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification(Outcome):
    """`verify`: whether every byte of a store is as it was written."""

    store: str
    ok: bool
    failed: str
    """The error line, if it is not `ok`."""
    files: int
    bytes: int
    damaged: list[DamagedFile]
    absent_shards: OrAbsent[int] = None
    """Of a rolling store: shards of `train` that are not there now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateStatistics(JsonObject):
    """Of one state, over sequences spread over the store."""

    layer: int
    rms: float
    rms_without_first: float
    """Without the first position of each sequence."""
    largest: float
    """The largest magnitude, and where it is."""
    sequence: int
    position: int
    channel: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreFacts(Outcome):
    """`info` of a store."""

    kind: str = "store"
    path: str
    fingerprint: str
    identity: dict[str, Any]
    details: dict[str, Any]
    compute_error: dict[str, Any] | None
    layers: list[int]
    attention_layers: list[int]
    logits: int
    context: int
    width: int
    dtype: str
    tokens: dict[str, int]
    """By split."""
    bytes: int
    bytes_of_float16_states: int
    compression: float
    """Of a rolling store: of what stays."""
    statistics: list[StateStatistics]
    """Of `train`; of a rolling store, of `validation`."""
    window_sequences: OrAbsent[int] = None
    """Of a rolling store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts(Outcome):
    """`info` of a run: its manifest, and what lies beside it."""

    kind: str = "run"
    path: str
    manifest: dict[str, Any]
    last_metrics: dict[str, Any] | None
    damaged_metrics: str | None
    weights_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The keys of the manifest among the others."""
        own = super().to_json()
        manifest = own.pop("manifest")
        return {key: own.pop(key) for key in ("kind", "path")} | manifest | own


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLine(JsonObject):
    """What a folder says of its run; None is what it does not say."""

    teacher: str
    """The folder of the experiment."""
    run: str
    state: str
    """`finished`, `unfinished`, `diverged` or `damaged`."""
    block: str | None = None
    objective: str | None = None
    solver: str | None = None
    seed: int | None = None
    train_tokens: int | None = None
    healed: bool = False
    k: int | None = None
    """Steps of the scores: those with the lowest KL that `evaluate` found."""
    nfe: int | float | None = None
    kl: float | None = None
    ppl: float | None = None
    agreement: float | None = None
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunList(Outcome):
    """`runs`: a line for each."""

    rows: list[RunLine]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Outcome):
    """`compare`: what two runs differ in, as pairs of values."""

    runs: list[RunLine]
    settings: dict[str, list[Any]]
    """Settings that differ."""
    same_settings: int
    """How many do not."""
    made_from: dict[str, list[Any]]
    """Teacher, store and versions, where they differ."""
    results: dict[str, list[Any]]
    """The best scores of both; empty unless both were evaluated."""
