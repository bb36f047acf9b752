"""`metrics.jsonl`: a line for each logged step of a run, and which of them are damaged."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.artefacts.base import MOST_BYTES, reason_of


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines that could be read, and what to say of the others."""

    rows: list[dict[str, Any]]
    damage: str | None = None
    """In a few words, with line numbers; None if the file is whole."""


def read_metrics(path: Path, digest: str | None = None) -> Metrics:
    """The lines of a run's metrics.

    Parameters
    ----------
    digest
        Of the whole file, as the run's manifest has it; None where none was recorded.
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
