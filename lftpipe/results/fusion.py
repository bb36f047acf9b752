"""What recognisers heard, and what language models made of it."""

import dataclasses
from typing import ClassVar

from lftpipe.results.base import Artefact, JsonObject
from lftpipe.results.outcomes import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognition(Outcome):
    """`recognise`: the store, and how many inputs it has."""

    store: str
    recogniser: str
    kind: str
    inputs: int
    added: int
    frames: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedText(JsonObject):
    """The best text of an input, with natural log-probabilities."""

    input: str
    text: str
    score: float
    recogniser: float
    language: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionRow(JsonObject):
    """Errors of one method over all inputs that were measured; intervals are of 95 %."""

    method: str
    model: str | None
    weight: float
    inputs: int
    cer: float
    cer_interval: list[float] | None
    wer: float
    wer_interval: list[float] | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion(Artefact):
    """`fused.json`: texts, and with references their errors."""

    NAME: ClassVar[str] = "a fusion"
    CURE: ClassVar[str] = "make it with `lftpipe fuse --force`"

    model: str
    heard: str
    weight: float
    settings: dict[str, object]
    texts: list[FusedText]
    rows: list[FusionRow]
    tuning: dict[str, float]
    """Character error rate by weight, on the half that is not measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Outcome):
    """`fuse`: the result and its file."""

    fusion: Fusion
    out: str
