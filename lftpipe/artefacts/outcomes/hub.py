"""What comes of sharing by the Hugging Face Hub: push, pull."""

import dataclasses

from lftpipe.artefacts.outcomes.base import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed(Outcome):
    """`push`: what was uploaded, and where it is now."""

    kind: str
    """`store`, `run` or `student`."""
    path: str
    url: str
    """As `lftpipe pull` takes it."""
    web: str
    """The repository's page."""
    bytes: int
    others: list[str] = dataclasses.field(default_factory=list)
    """Runs that are one student with this one, and were not uploaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulled(Outcome):
    """`pull`: what came, and where it is now."""

    kind: str
    """`store` or `run`."""
    source: str
    path: str
    teacher: str
    already_there: bool
