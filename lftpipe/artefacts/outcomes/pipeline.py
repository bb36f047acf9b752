"""What the commands of the pipeline say they made, from `extract` to `report`."""

import dataclasses
from typing import Any, ClassVar

from lftpipe.artefacts.outcomes.base import Outcome
from lftpipe.artefacts.recoupling import RecouplingMap
from lftpipe.artefacts.results import Results
from lftpipe.artefacts.sweep import Sweep, Toy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedExtraction(Outcome):
    """`extract --dry-run`: what would be stored, and a time from a short measured probe."""

    store: str
    dry_run: bool = True
    teacher: str
    corpus: str
    tokens: dict[str, int]
    """By split."""
    layers: list[int]
    attention_layers: list[int]
    logits: int
    dtype: str
    compute_dtype: str
    bytes: int
    bytes_by_array: dict[str, int]
    free_bytes: int
    batch_sequences: int
    batch_asked: int
    probe_tokens_per_second: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction(Outcome):
    """`extract`: what the store holds now, and what this call computed of it."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"part", "complete", "rolling"})

    store: str
    teacher: str
    already_complete: bool
    tokens: dict[str, int]
    """By split."""
    tokens_asked: dict[str, int]
    documents: dict[str, int]
    layers: list[int]
    attention_layers: list[int]
    logits: int
    compute_dtype: str
    batch_sequences: int
    batch_asked: int
    bytes: int
    seconds: float
    tokens_per_second: float
    part: list[int] | None = None
    """Of `--part`: which of how many."""
    complete: bool | None = None
    """Of `--part`: whether all parts are there."""
    rolling: dict[str, int] | None = None
    """Of `--rolling`: shards made, made again and dropped, and the most bytes of states at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recoupling(Outcome):
    """`recouple`: the map, and where it was written."""

    map: RecouplingMap
    store: str
    out: str
    pictures: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The keys of the map among the others."""
        own = super().to_json()
        return own.pop("map") | own


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun(Outcome):
    """One run: where it is, and how it ended. What was not measured is left out."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset(
        ("steps", "loss", "seconds", "tokens_per_second", "data_wait_share", "already_finished", "joint")
    )

    run: str
    block: list[int]
    objective: str
    steps: int | None = None
    train_tokens: int
    loss: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    data_wait_share: float | None = None
    already_finished: bool | None = None
    joint: list[str] | None = None
    """All runs whose flow layers are one student's, this one among them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Outcome):
    """`train`: the runs that one command made."""

    runs: list[TrainedRun]
    store: str

    def to_json(self) -> dict[str, Any]:
        """The keys of a single run among the others; several runs as a list."""
        if len(self.runs) == 1:
            return self.runs[0].to_json() | {"store": self.store}
        return super().to_json()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Healing(Outcome):
    """`heal`: the run that was made of another, and how training ended."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset(
        (
            "objective",
            "train_tokens",
            "steps",
            "loss",
            "seconds",
            "tokens_per_second",
            "already_finished",
            "joint",
        )
    )

    run: str
    already_finished: bool | None = None
    objective: str | None = None
    train_tokens: int | None = None
    steps: int | None = None
    loss: float | None = None
    held_back_loss: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    store: str
    healed: str
    block: list[int]
    joint: list[str] | None = None
    """Of a student of several flow layers: all runs that were made, `run` among them."""

    def to_json(self) -> dict[str, Any]:
        """A run that was finished already says nothing of its losses."""
        own = super().to_json()
        if self.already_finished:
            del own["held_back_loss"]
        return own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Outcome):
    """`evaluate`: the table, and where it was written."""

    results: Results
    out: str

    def to_json(self) -> dict[str, Any]:
        """The keys of the table among the others."""
        return self.results.to_json() | {"out": self.out}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweeping(Outcome):
    """`sweep`: what every block reached, and where it was written."""

    sweep: Sweep
    out: str
    trained: int
    """Runs that were trained now."""

    def to_json(self) -> dict[str, Any]:
        """The keys of the sweep among the others."""
        return self.sweep.to_json() | {"out": self.out, "trained": self.trained}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyFigure(Outcome):
    """`toy`: what each panel kept, and where it was written."""

    toy: Toy
    out: str

    def to_json(self) -> dict[str, Any]:
        """The keys of the toy among the others."""
        return self.toy.to_json() | {"out": self.out}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportPage(Outcome):
    """`report`: the pages, their pictures, and what could not be read."""

    report: str
    markdown: str
    pictures: list[str]
    damaged: list[str]
