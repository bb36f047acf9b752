"""A run's folder: the names of its files, and those that a run in progress writes."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from lftpipe.config.recipe import RECORD_TABLE
from lftpipe.errors import RunError, foreign
from lftpipe.files import write_atomic

MANIFEST, SETTINGS, METRICS, WEIGHTS, CHECKPOINT, DIVERGED = (
    "manifest.json",
    "settings.toml",
    "metrics.jsonl",
    "flow.safetensors",
    "checkpoint/state.pt",
    "diverged.json",
)


def write_settings(
    run: Path,
    settings: dict[str, Any],
    store_fingerprint: str,
    table: str = "train",
    healed: str | None = None,
) -> None:
    """The run's resolved settings as a recipe that makes it again, and the store they go with.

    Parameters
    ----------
    healed
        Digest of the weights that it healed, if it did.
    """
    run.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": store_fingerprint} | ({"healed": healed} if healed else {})
    recipe = {table: settings, RECORD_TABLE: record}
    write_atomic(run / SETTINGS, tomli_w.dumps(recipe).encode())


def read_settings(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What `write_settings` wrote: the settings, and what they go with, as `fingerprint` and `healed`."""
    with foreign(RunError, f"damaged {run / SETTINGS}", "the run's settings", "start again with --force"):
        recipe = tomllib.loads((run / SETTINGS).read_text())
        settings, record = recipe["heal" if "heal" in recipe else "train"], recipe[RECORD_TABLE]
        if not (isinstance(settings, dict) and isinstance(record["fingerprint"], str)):
            raise TypeError("no table of settings")
        return settings, record


def note_divergence(run: Path, step: int, learning_rate: float) -> None:
    """Record where a run diverged: it may be resumed with other settings of its steps then."""
    note = {"step": step, "learning_rate": learning_rate}
    write_atomic(run / DIVERGED, (json.dumps(note) + "\n").encode())


def drop_metrics_after(run: Path, step: int) -> None:
    """Cut the lines of steps that will be done again, and one that a kill cut short."""
    metrics = run / METRICS
    if metrics.exists():
        lines = metrics.read_bytes().decode(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomic(metrics, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> int | float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
