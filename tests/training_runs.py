"""What the tests of training ask of settings and of a run's folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT
from safetensors.torch import load_file

from lftpipe import runs
from lftpipe.config.settings import TrainSettings
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training import step as training_step


def short_run(store: Path, folder: Path, **values: Any) -> TrainSettings:
    """Twelve steps of four sequences in float32, for layers 1 and 2, with a line for each step."""
    given = {
        "store": store,
        "block": "1:3",
        "tokens": 12 * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "solver": "euler",
        "run": str(folder / "run"),
        "log_every": 1,
        "checkpoint_every": 5,
    }
    return TrainSettings(**given | values)


def change(settings: TrainSettings, **values: Any) -> TrainSettings:
    return dataclasses.replace(settings, **values)


def log_of(run: str | Path | None) -> list[dict[str, Any]]:
    """The lines of its metrics."""
    return [json.loads(line) for line in (Path(str(run)) / runs.METRICS).read_text().splitlines()]


def weights_of(run: str | Path | None) -> dict[str, torch.Tensor]:
    return load_file(Path(str(run)) / runs.WEIGHTS)


def assert_same_weights(one: str | Path, other: str | Path, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights_of(one), weights_of(other), **tolerance)


def teacher_of(store: Store, workspace: Path = Path("unused")) -> Teacher:
    """The teacher that a store was made with."""
    return open_recorded(record_of(store.identity), workspace, store.path)


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Kill the next run as it is about to do a step."""
    real = training_step.loss_of

    def loss_of(run, batch):
        if run.step == step and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return real(run, batch)

    monkeypatch.setattr(training_step, "loss_of", loss_of)
