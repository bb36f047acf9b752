"""A run's `manifest.json`: what a finished run says of itself."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from lftpipe.artefacts.base import Artefact, read_json, require


@with_config({"extra": "allow", "strict": True})
class RecordedTeacher(TypedDict):
    """What of `Teacher.identity()` is read again; the file has more."""

    model: str
    revision: str | None
    weights_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunManifest(Artefact):
    """A finished run: of which teacher and store, which block, how trained, and which weights."""

    NAME: ClassVar[str] = "a finished run with a readable manifest.json"
    CURE: ClassVar[str] = "train it again"

    block: tuple[int, int]
    objective: str
    solver: Literal["euler", "midpoint"]
    walk_steps: int
    seed: int
    train_tokens: int
    store_fingerprint: str
    weights_digest: str
    teacher: RecordedTeacher
    velocity: dict[str, bool | int]
    """What `build_flow` makes: flags, and numbers of layers."""
    store_origin: str | None = None
    """`Store.origin`, which a store keeps when it grows."""
    healed: dict[str, Any] | None = None
    """Of a run that `lftpipe heal` made: which run it healed, and how."""
    joint: list[str] | None = None
    """Names of all runs, this one among them, whose flow layers were trained as one student."""
    student: str | None = None
    """What all these runs have in common, and runs of no other student."""
    metrics_digest: str | None = None
    """Of `metrics.jsonl`; older runs have none."""

    def check(self) -> None:
        """The block has layers, and steps and tokens are no less than nothing."""
        m, n = self.block
        require(0 <= m < n, f"block {m}:{n} has no layers")
        require(self.walk_steps >= 1 and self.train_tokens >= 0, "walk_steps or train_tokens is too small")
        require("time" in self.velocity or "linear" in self.velocity, "velocity says nothing of time")


def metrics_digest(run: Path) -> str | None:
    """The digest of a run's metrics as its manifest has it; None if that has none, or cannot be read."""
    try:
        value: Any = read_json(run / "manifest.json").get("metrics_digest")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None
