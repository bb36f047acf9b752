"""What each command returns, and prints with `--json`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from lftpipe.results.base import JsonObject, OrAbsent
from lftpipe.results.plan import Plan
from lftpipe.results.recoupling import RecouplingMap, Sweep, Toy
from lftpipe.results.scores import Results

# --- What a stage returns, as a type: its fields are the keys that `--json` prints.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(JsonObject, Mapping[str, Any]):
    """What a stage returns. As a mapping it has the keys and values that `--json` prints."""

    @functools.cached_property
    def _printed(self) -> dict[str, Any]:
        return self.to_json()

    def __getitem__(self, key: str) -> Any:
        return self._printed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._printed)

    def __len__(self) -> int:
        return len(self._printed)


# --- What the commands of the pipeline say they made, from `extract` to `report`.


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
    part: OrAbsent[list[int]] = None
    """Of `--part`: which of how many."""
    complete: OrAbsent[bool] = None
    """Of `--part`: whether all parts are there."""
    rolling: OrAbsent[dict[str, int]] = None
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

    run: str
    block: list[int]
    shape: str
    objective: str
    steps: OrAbsent[int] = None
    train_tokens: int
    loss: OrAbsent[float] = None
    seconds: OrAbsent[float] = None
    tokens_per_second: OrAbsent[float] = None
    data_wait_share: OrAbsent[float] = None
    already_finished: OrAbsent[bool] = None


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

    run: str
    already_finished: OrAbsent[bool] = None
    objective: OrAbsent[str] = None
    train_tokens: OrAbsent[int] = None
    steps: OrAbsent[int] = None
    loss: OrAbsent[float] = None
    held_back_loss: float | None = None
    seconds: OrAbsent[float] = None
    tokens_per_second: OrAbsent[float] = None
    store: str
    healed: str
    block: list[int]
    shape: str

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
class Planning(Outcome):
    """`plan`: candidates and the chosen shape, and where they were written."""

    plan: Plan
    out: str

    def to_json(self) -> dict[str, Any]:
        """The keys of the plan among the others."""
        return self.plan.to_json() | {"out": self.out}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed(Outcome):
    """`compress`: the checkpoint, and what led to it."""

    out: str
    form: str
    shape: str
    plan: str
    run: str
    report: str
    results: Results


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


# --- What comes of using a student: export, generate.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported(Outcome):
    """`export`: the folder, and what it is made of."""

    out: str
    form: str
    model_type: str
    teacher: str
    blocks: list[str]
    shape: str
    """What replaces which layers, in short."""
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
    seed: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    writer: WriterFacts
    written: Written
    beside: BesideTeacher | None = None

    def to_json(self) -> dict[str, Any]:
        """All keys on one level."""
        asked = super().to_json()
        del asked["writer"], asked["written"], asked["beside"]
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


# --- What comes of sharing by the Hugging Face Hub: push, pull.


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulled(Outcome):
    """`pull`: what came, and where it is now."""

    kind: str
    """`store` or `run`."""
    source: str
    path: str
    teacher: str
    already_there: bool
