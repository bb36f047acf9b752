"""What the tests of training ask of settings and of a run's folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lftpipe import runs
from lftpipe.settings import TrainSettings


def change(settings: TrainSettings, **values: Any) -> TrainSettings:
    return dataclasses.replace(settings, **values)


def log_of(run: str | Path | None) -> list[dict[str, Any]]:
    """The lines of its metrics."""
    return [json.loads(line) for line in (Path(str(run)) / runs.METRICS).read_text().splitlines()]


def weights_of(run: str | Path | None) -> dict[str, torch.Tensor]:
    return load_file(Path(str(run)) / runs.WEIGHTS)
