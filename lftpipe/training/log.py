"""What a run tells while it trains: `metrics.jsonl`, and trackers such as TensorBoard."""

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.base.files import fingerprint
from lftpipe.config.settings import HealSettings, TrainSettings, to_json
from lftpipe.training import distributed
from lftpipe.training.run import ModuleTraining

# --- Trackers: a run's metrics as they come, in TensorBoard's files, Weights & Biases or Trackio.

#: Under which the services list all runs.
PROJECT = "lftpipe"

#: What is no figure of its own.
_PLACE = ("step", "tokens")


class TensorBoard:
    """Event files in the run's folder, over tokens.

    `tokens`: where it goes on; later events of a run that was killed are hidden.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=tokens
        )

    def write(self, row: Mapping[str, int | float]) -> None:
        """Track one line."""
        for key, value in _figures(row).items():
            self._writer.add_scalar(key, value, row["tokens"])

    def close(self) -> None:
        """Hand over what is left."""
        self._writer.close()


class Service:
    """A run of Weights & Biases or of Trackio, which have the same calls."""

    def __init__(self, package: str, folder: Path, options: dict[str, Any]) -> None:
        identity: dict[str, Any] = {}
        if package == "wandb":  # resumed under its id; one command may train several runs
            name = fingerprint([str(folder.resolve())])[:16]
            identity = {"id": name, "dir": str(folder), "reinit": "create_new"}
        self._run = _needed(package, package).init(
            project=PROJECT, name=folder.name, config=options, resume="allow", **identity
        )

    def write(self, row: Mapping[str, int | float]) -> None:
        """Track one line."""
        self._run.log({**_figures(row), "tokens": row["tokens"]}, step=int(row["step"]))

    def close(self) -> None:
        """Hand over what is left."""
        self._run.finish()


Tracker = TensorBoard | Service


def tracker_of(settings: TrainSettings | HealSettings, folder: Path, tokens: int) -> Tracker | None:
    """The tracker that `--track` names; None without one."""
    track = settings.track
    if track == "tensorboard":
        return TensorBoard(folder, tokens)
    return Service(track, folder, to_json(settings)) if track else None


def check_tracker(settings: TrainSettings | HealSettings) -> None:
    """Refuse a tracker that is not installed, before anything is computed."""
    if (track := settings.track) is not None:
        _needed("torch.utils.tensorboard" if track == "tensorboard" else track, track)


def _needed(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"--track {extra} without the package {extra}", "that package", f'pip install "lftpipe[{extra}]"'
        ) from error


def _figures(row: Mapping[str, int | float]) -> dict[str, int | float]:
    return {key: value for key, value in row.items() if key not in _PLACE}


# --- A run's metrics: one JSON object a logged step, and a tracker if wanted.


class Log:
    """Writes `metrics.jsonl`; of several processes only the first does."""

    def __init__(self, run: ModuleTraining) -> None:
        self.run = run
        writes = distributed.rank() == 0
        self._file = (run.folder / runs.METRICS).open("a" if run.step else "w") if writes else None
        done = run.step * run.tokens_per_step
        self._tracker = tracker_of(run.settings, run.folder, done) if writes else None

    def write(self, learning_rate: float, nmse: float, evaluated: dict[str, float]) -> None:
        """A line for the step just done; what is NaN was not measured.

        `evaluated`: what was found on sequences that are not trained on, by name.
        """
        run = self.run
        row = {
            "step": run.step,
            "tokens": run.step * run.tokens_per_step,
            "loss": run.loss,
            "nmse": nmse,
            "learning_rate": learning_rate,
            "seconds": round(run.seconds, 3),
            "data_wait_seconds": round(run.waited, 3),
            **evaluated,
        }
        row = {key: value for key, value in row.items() if not math.isnan(value)}
        if self._file:
            self._file.write(json.dumps(row) + "\n")
        if self._tracker:
            self._tracker.write(row)

    def flush(self) -> None:
        """Hand all lines to the system, before a checkpoint that comes after them."""
        if self._file:
            self._file.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file:
            self._file.close()
        if self._tracker:
            self._tracker.close()
