"""What a run's folder records as JSON: manifest, metrics, kept samples, the source of an export."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import xxhash
from pydantic import ValidationError, with_config
from typing_extensions import TypedDict

from lftpipe.base.files import MOST_BYTES, read_json, write_atomic
from lftpipe.base.shape import Part
from lftpipe.results.base import READ_STRICTLY, Artefact, adapter, reason_of, require

# --- A run's `manifest.json`: what a finished run says of itself.


@with_config({"extra": "allow", "strict": True})
class RecordedTeacher(TypedDict):
    """What of `Teacher.identity()` is read again; the file has more."""

    model: str
    revision: str | None
    weights_digest: str
    config_digest: str
    tokenizer_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunManifest(Artefact):
    """A finished run: of which teacher and store, which block, how trained, and which weights."""

    NAME: ClassVar[str] = "a finished run with a readable manifest.json"
    CURE: ClassVar[str] = "train it again"

    block: tuple[int, int]
    """From the first part's start to the last one's end."""
    parts: tuple[Part, ...]
    """What replaces which layers; between them the teacher's own stay."""
    shape: str
    """The same in short."""
    objective: str
    solver: Literal["euler", "midpoint"]
    walk_steps: int
    seed: int
    train_tokens: int
    store_fingerprint: str
    weights_digest: str
    teacher: RecordedTeacher
    store_origin: str | None = None
    """`Store.origin`, which a store keeps when it grows."""
    healed: dict[str, Any] | None = None
    """Of a run that `lftpipe heal` made: which run it healed, and how."""
    metrics_digest: str | None = None
    """Of `metrics.jsonl`, where the run was trained in steps."""

    def check(self) -> None:
        """The block has layers, and steps and tokens are no less than nothing."""
        m, n = self.block
        require(0 <= m < n, f"block {m}:{n} has no layers")
        require(self.walk_steps >= 1 and self.train_tokens >= 0, "walk_steps or train_tokens is too small")
        ends = [end for part in self.parts for end in part.block]
        require(ends == sorted(ends) and ends[:1] + ends[-1:] == [m, n], f"parts do not make up {m}:{n}")


def metrics_digest(run: Path) -> str | None:
    """The digest of a run's metrics as its manifest has it; None if that has none, or cannot be read."""
    try:
        value: Any = read_json(run / "manifest.json").get("metrics_digest")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None


# --- `lftpipe.json` of an exported folder: from what it was made, and what lftpipe put there.

#: The file's name.
SOURCE = "lftpipe.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSource(Artefact):
    """Runs and teacher of a student that was exported."""

    NAME: ClassVar[str] = f"the {SOURCE} of an exported folder"
    CURE: ClassVar[str] = "export it again"

    form: str
    blocks: list[str]
    runs: list[str]
    k: int
    solver: str
    teacher: RecordedTeacher
    lftpipe: str
    files: list[str]
    """Names of all files of the folder."""

    def check(self) -> None:
        """There is a block and a run for each, and steps to take."""
        require(len(self.blocks) >= len(self.runs) >= 1, "blocks and runs disagree")
        require(self.k >= 1, "k is not positive")

    @classmethod
    def of_folder(cls, folder: Path) -> "ExportSource":
        """Read that of a folder."""
        return cls.from_json(folder / SOURCE)


# --- `metrics.jsonl`: a line for each logged step of a run, and which of them are damaged.


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines that could be read, and what to say of the others."""

    rows: list[dict[str, Any]]
    damage: str | None = None
    """In a few words, with line numbers; None if the file is whole."""


def read_metrics(path: Path, digest: str | None = None) -> Metrics:
    """The lines of a run's metrics.

    `digest`: of the whole file, as the run's manifest has it; None where none was recorded.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MOST_BYTES):
            return Metrics([], f"{path} is no file of metrics")
        data = path.read_bytes()
    except OSError as error:
        return (
            Metrics([], f"{path} is missing" if digest else None)
            if _absent(error)
            else Metrics([], f"{path}: {reason_of(error)}")
        )
    rows, damaged = [], []
    for number, line in enumerate(data.splitlines(), 1):
        row = _row(line)
        if row is None or (rows and row["step"] <= rows[-1]["step"]):
            damaged.append(number)
        else:
            rows.append(row)
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        return Metrics(rows, f"{path}: {len(damaged)} damaged line(s), left out: {some}")
    if digest is not None and xxhash.xxh3_128_hexdigest(data) != digest:
        return Metrics(rows, f"{path} is not as the run wrote it")
    return Metrics(rows)


def _absent(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's object: a step, its tokens, and finite numbers; None if it is anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(_whole(row.get(key)) for key in ("step", "tokens")):
        return None
    numbers = (isinstance(value, int | float) and not isinstance(value, bool) for value in row.values())
    return row if all(numbers) else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


# --- `samples.jsonl` of a run: prompts, and how teacher and student continue them. One JSON object a line.

#: The file's name.
SAMPLES = "samples.jsonl"

#: Largest file that is read.
_MOST_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt, continued by both."""

    __pydantic_config__ = READ_STRICTLY

    run: str
    prompt: str
    teacher: str
    teacher_text: str
    student_text: str
    common_tokens: int
    """Tokens that agree before the first that does not."""
    k: int | None = None
    solver: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def asked(self) -> tuple[Any, ...]:
        """What was asked for: a sample replaces an earlier one of the same."""
        drawn = (self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        return self.prompt, self.k, self.solver, *drawn


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """The samples of a run, and what could not be read, in words.

    `path`: the file; one that is not there has no samples.
    """
    if not path.is_file():
        return [], []
    if path.stat().st_size > _MOST_BYTES:
        return [], [f"{path} is larger than {_MOST_BYTES:,} bytes"]
    samples, damage = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(adapter(Sample).validate_json(line))
        except ValidationError as error:
            damage.append(f"{path}: line {number} is damaged, left out ({reason_of(error)})")
    return samples, damage


def keep_sample(path: Path, sample: Sample) -> None:
    """Add a sample to a run's, in place of one that was asked for in the same words.

    A line that cannot be read is kept as it is.
    """
    before = path.read_bytes().splitlines() if path.is_file() else []
    kept = [line for line in before if line.strip() and not _asks(line, sample)]
    new = json.dumps(dataclasses.asdict(sample)).encode()
    write_atomic(path, b"".join(line + b"\n" for line in (*kept, new)))


def _asks(line: bytes, sample: Sample) -> bool:
    """Whether a line is a sample of the same question."""
    try:
        return adapter(Sample).validate_json(line).asked == sample.asked
    except ValidationError:
        return False
