"""`samples.jsonl` of a run: prompts, and how teacher and student continue them. One JSON object a line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lftpipe.artefacts.base import READ_STRICTLY, reason_of
from lftpipe.files import write_atomic

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
    seed: int = 0

    @property
    def asked(self) -> tuple[Any, ...]:
        """What was asked for: a sample replaces an earlier one of the same."""
        return self.prompt, self.k, self.solver, self.temperature, self.seed


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """The samples of a run, and what could not be read, in words.

    Parameters
    ----------
    path
        The file; one that is not there has no samples.
    """
    from pydantic import TypeAdapter, ValidationError

    if not path.is_file():
        return [], []
    if path.stat().st_size > _MOST_BYTES:
        return [], [f"{path} is larger than {_MOST_BYTES:,} bytes"]
    reader = TypeAdapter(Sample)
    samples, damage = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(reader.validate_json(line))
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
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Sample).validate_json(line).asked == sample.asked
    except ValidationError:
        return False
