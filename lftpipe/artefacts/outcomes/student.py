"""What comes of using a student: export, generate."""

import dataclasses
from typing import Any

from lftpipe.artefacts.base import JsonObject
from lftpipe.artefacts.outcomes.base import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported(Outcome):
    """`export`: the folder, and what it is made of."""

    out: str
    form: str
    model_type: str
    teacher: str
    blocks: list[str]
    runs: list[str]
    k: int
    solver: str
    layers: int
    attention_evaluations: int
    parameters: int
    dtype: str
    pushed: str | None = None
    """The page on the Hub, if it was uploaded."""
    max_logit_difference: float | None
    """Of a plain form to the student, on random tokens."""
    bytes: int
    """On the disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterFacts(JsonObject):
    """A model that writes; the steps of a student."""

    model: str
    k: int | None = None
    solver: str | None = None
    nfe: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(JsonObject):
    """A text, and how fast it came."""

    text: str
    new_tokens: int
    seconds: float
    first_token_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafted(Written):
    """A text of the teacher with a draft, beside the teacher alone."""

    proposed_tokens: int
    accepted_tokens: int
    acceptance_rate: float | None
    teacher_calls: int
    equals_teacher: bool
    speed_up: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideTeacher(JsonObject):
    """The teacher's text, and how the student's compares."""

    name: str
    written: Written
    common_tokens: int
    """That agree before the first that does not."""
    speed_up: float
    kept: str | None
    """The file that both texts were kept in."""

    def to_json(self) -> dict[str, Any]:
        """The teacher with its text under one key."""
        return {
            "teacher": {"model": self.name} | self.written.to_json(),
            "common_tokens": self.common_tokens,
            "speed_up": self.speed_up,
            "kept": self.kept,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation(Outcome):
    """`generate`: how a model continues a prompt, perhaps beside its teacher."""

    prompt: str
    temperature: float
    seed: int
    writer: WriterFacts
    written: Written
    beside: BesideTeacher | None = None

    def to_json(self) -> dict[str, Any]:
        """All keys on one level."""
        asked = {"prompt": self.prompt, "temperature": self.temperature, "seed": self.seed}
        beside = self.beside.to_json() if self.beside else {}
        return asked | self.writer.to_json() | self.written.to_json() | beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting(Outcome):
    """`generate --draft`: the teacher with the student as its draft, alone, and with layers skipped."""

    prompt: str
    teacher: str
    draft: WriterFacts
    written: Drafted
    teacher_alone: Written
    skip_draft: Drafted

    def to_json(self) -> dict[str, Any]:
        """The keys of the drafted text among the others."""
        own = super().to_json()
        written, last = own.pop("written"), {key: own.pop(key) for key in ("teacher_alone", "skip_draft")}
        return own | written | last
