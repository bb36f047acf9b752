"""Beam search over a recogniser's units, each hypothesis corrected by a language model of bytes.

    score(b) = (1 - r) log P_R(b | x) + r log P_L(b | prompt)

`exact` scores all bytes of a hypothesis; `delayed` those of its parent, one unit late, as GFD's authors do.
Both terms fall with every unit, so that the search may stop once what is finished is ahead of all others.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lftpipe.base.errors import SettingsError
from lftpipe.fusion.byte_model import END, ByteModel
from lftpipe.fusion.recogniser import Recogniser
from lftpipe.fusion.vocabulary import is_whole, utf8_next

Timing = Literal["exact", "delayed"]
End = Literal["none", "eos", "newline"]
Rows = Float[np.ndarray, "beam unit_or_end"]


@dataclass(frozen=True)
class Heard:
    """A finished text with its natural log-probabilities."""

    text: str
    score: float
    recogniser: float
    language: float


@dataclass(frozen=True)
class _Beam:
    text: bytes
    recogniser: float
    language: float
    score: float
    state: Any


class _Grown(NamedTuple):
    """A hypothesis with one more unit, whose state is not computed yet."""

    before: _Beam
    unit: int
    text: bytes
    recogniser: float
    language: float
    score: float

    def beam(self, recogniser: Recogniser) -> _Beam:
        """With its state."""
        state = recogniser.extend(self.before.state, self.unit)
        return _Beam(self.text, self.recogniser, self.language, self.score, state)


@dataclass(frozen=True)
class Search:
    """How texts are searched for.

    `weight` is r, between 0 and 1. `candidates` are the units of each beam that the language model scores,
    the recogniser's best first: at least twice as many as beams. `end` closes a text for the language model.
    """

    weight: float = 0.2
    beams: int = 5
    candidates: int = 10
    timing: Timing = "exact"
    end: End = "none"
    longest: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise SettingsError(f"weight {self.weight:g}", "0 to 1", "choose such a weight")
        if self.beams < 1 or self.candidates < 1:
            raise SettingsError(
                f"{self.beams} beams of {self.candidates} candidates", "at least one", "raise them"
            )

    def best(self, recogniser: Recogniser, language: ByteModel | None) -> list[Heard]:
        """The best finished hypotheses, at most as many as beams; after `longest` units, unfinished ones."""
        use = language if self.weight else None
        beams, finished = [_Beam(b"", 0.0, 0.0, 0.0, recogniser.start())], []
        for _ in range(self.longest):
            rows = recogniser.next([beam.state for beam in beams])
            ended = self._ended(use, beams, rows)
            grown = self._grown(recogniser.units, use, beams, rows)
            # As in transformers: an end counts if it is among the best of all that may come next.
            best = heapq.nlargest(2 * self.beams, [*ended, *grown], key=lambda each: each.score)
            finished += [each for each in best[: self.beams] if isinstance(each, Heard)]
            finished = heapq.nlargest(self.beams, finished, key=lambda heard: heard.score)
            worst = finished[-1].score if len(finished) == self.beams else -math.inf
            going = [each for each in best if isinstance(each, _Grown) and each.score > worst][: self.beams]
            beams = [each.beam(recogniser) for each in going]
            if not beams:
                return finished
        cut = [Heard(b.text.decode(errors="ignore"), b.score, b.recogniser, b.language) for b in beams]
        return finished or cut

    def _fused(self, recogniser: float, language: float) -> float:
        return (1 - self.weight) * recogniser + (self.weight * language if self.weight else 0.0)

    def _ended(self, language: ByteModel | None, beams: list[_Beam], rows: Rows) -> list[Heard]:
        ended = []
        for beam, row in zip(beams, rows, strict=True):
            if not is_whole(beam.text) or row[-1] == -math.inf:
                continue
            log_p = beam.recogniser + float(row[-1])
            closed = 0.0
            if language:
                closed = language.prefix(beam.text + (b"\n" if self.end == "newline" else b""))
                closed += float(language.next_bytes(beam.text)[END]) if self.end == "eos" else 0.0
            ended.append(Heard(beam.text.decode(), self._fused(log_p, closed), log_p, closed))
        return ended

    def _grown(
        self, units: Sequence[bytes], language: ByteModel | None, beams: list[_Beam], rows: Rows
    ) -> list[_Grown]:
        found: list[tuple[_Beam, int, float]] = []
        count = min(max(self.candidates, 2 * self.beams), len(units))
        for beam, row in zip(beams, rows, strict=True):
            found.extend(
                (beam, unit, beam.recogniser + float(row[unit]))
                for unit in np.argpartition(-row[:-1], count - 1)[:count].tolist()
                if row[unit] > -math.inf and units[unit] and _stays_utf8(beam.text, units[unit])
            )
        texts = [beam.text + units[unit] for beam, unit, _ in found]
        scored = [beam.text for beam, *_ in found] if self.timing == "delayed" else texts
        gains = language.prefixes(scored) if language else [0.0] * len(found)
        return [
            _Grown(beam, unit, text, log_p, gain, self._fused(log_p, gain))
            for (beam, unit, log_p), text, gain in zip(found, texts, gains, strict=True)
        ]


def _stays_utf8(text: bytes, more: bytes) -> bool:
    for byte in more:
        if not utf8_next(text)(byte):
            return False
        text += bytes([byte])
    return True


def rescored(found: list[Heard], language: ByteModel, weight: float) -> list[Heard]:
    """The recogniser's own hypotheses in the order of the fused score: a cascade, for comparison."""
    again = []
    for heard in found:
        log_p = language.prefix(heard.text.encode())
        score = (1 - weight) * heard.recogniser + weight * log_p
        again.append(Heard(heard.text, score, heard.recogniser, log_p))
    return sorted(again, key=lambda heard: -heard.score)
