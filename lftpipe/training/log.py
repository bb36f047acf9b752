"""A run's metrics: one JSON object a logged step, and TensorBoard's events if wanted."""

import json
from typing import Any

from lftpipe import runs
from lftpipe.errors import SettingsError
from lftpipe.training import processes
from lftpipe.training.run import TrainingRun


class Log:
    """Writes `metrics.jsonl`; of several processes only the first does.

    Parameters
    ----------
    run
        Whose metrics.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        writes = processes.rank() == 0
        self._file = (run.folder / runs.METRICS).open("a" if run.step else "w") if writes else None
        self._board = _board(run) if writes and run.settings.tensorboard else None

    def write(self, learning_rate: float, nmse: float, evaluated: dict[str, float]) -> None:
        """A line for the step just done.

        Parameters
        ----------
        learning_rate
            Of the step.
        nmse
            On the step's batch, after it.
        evaluated
            What was found on sequences that are not trained on, by name.
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
        if self._file:
            self._file.write(json.dumps(row) + "\n")
        if self._board:
            for key, value in row.items():
                if key not in ("step", "tokens"):
                    self._board.add_scalar(key, value, row["tokens"])

    def flush(self) -> None:
        """Hand all lines to the system, before a checkpoint that comes after them."""
        if self._file:
            self._file.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def _board(run: TrainingRun) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "--tensorboard without TensorBoard", "the tensorboard package", "pip install tensorboard"
        ) from error
    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step * run.tokens_per_step)
