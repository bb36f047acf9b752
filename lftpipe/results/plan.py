"""`plan.json`: candidates for the parts of a student, what each costs and loses, and the chosen shape."""

import dataclasses
from typing import Any, ClassVar

from lftpipe.base.shape import Part
from lftpipe.results.base import Artefact, JsonObject, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost(JsonObject):
    """What a part, or a whole model, costs."""

    parameters: int
    layers: int
    prefill: float
    """Seconds a token, of a batch of whole sequences."""
    decode: float
    """Seconds a token, of a single one."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in FIELDS}
        )

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(
            **{field.name: getattr(self, field.name) - getattr(other, field.name) for field in FIELDS}
        )


FIELDS = dataclasses.fields(Cost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate(JsonObject):
    """One part in place of its layers, all others the teacher's."""

    part: Part
    score: float
    """KL of next tokens, on held-back training sequences."""
    stderr: float
    """Its standard error, over sequences."""
    cost: Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(JsonObject):
    """A whole shape."""

    shape: str
    parts: list[Part]
    predicted: float
    """The sum of its parts' scores."""
    score: float | None = None
    """KL of the whole shape, whose parts were trained alone, on held-back training sequences."""
    stderr: float | None = None
    cost: Cost
    size: float
    """Parameters over the teacher's."""
    speed: float
    """Decoded tokens a second over the teacher's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Artefact):
    """What was tried, what was chosen, and what would be chosen at other budgets."""

    NAME: ClassVar[str] = "a plan"
    CURE: ClassVar[str] = "run `lftpipe plan --force`"

    teacher: str
    store: str
    """Fingerprint of the store."""
    num_layers: int
    cost: Cost
    """Of the teacher."""
    candidates: list[Candidate]
    choice: Choice
    tried: list[Choice]
    """Shapes that were scored whole, from the first choice on."""
    front: list[Choice]
    """At other budgets, the smallest first; only their parts were scored."""
    settings: dict[str, Any]
    lftpipe: str

    def check(self) -> None:
        """The choice is made of candidates."""
        known = {candidate.part for candidate in self.candidates}
        require(set(self.choice.parts) <= known, "the choice has parts that are no candidates")
