"""A run's metrics: one JSON object a logged step, and a tracker if wanted."""

import json

from lftpipe import runs
from lftpipe.training import processes
from lftpipe.training.run import TrainingRun
from lftpipe.training.trackers import tracker_of


class Log:
    """Writes `metrics.jsonl`; of several processes only the first does."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        writes = processes.rank() == 0
        self._file = (run.folder / runs.METRICS).open("a" if run.step else "w") if writes else None
        done = run.step * run.tokens_per_step
        self._tracker = tracker_of(run.settings, run.folder, done) if writes else None

    def write(self, learning_rate: float, nmse: float, evaluated: dict[str, float]) -> None:
        """A line for the step just done.

        Parameters
        ----------
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
