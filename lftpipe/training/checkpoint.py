"""Checkpoints: all that a killed run needs to go on, in one file for runs that are trained jointly."""

import io
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lftpipe import runs
from lftpipe.errors import RunError
from lftpipe.files import write_atomic
from lftpipe.training import processes
from lftpipe.training.run import TrainingRun


class Checkpoint:
    """The checkpoint of runs that are trained jointly, in the first one's folder.

    It is written by a thread while training goes on, whole or not at all. Of several processes only the first
    writes.

    Parameters
    ----------
    joint
        The runs.
    """

    def __init__(self, joint: Sequence[TrainingRun]) -> None:
        self._runs = joint
        self._path: Path = joint[0].folder / runs.CHECKPOINT
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self) -> None:
        """Begin to write the runs' state as it is now.

        Raises
        ------
        OSError
            If the one before could not be written.
        """
        if processes.rank() != 0:
            return
        self.wait()
        state = _copied([run.state() for run in self._runs])
        self._thread = threading.Thread(target=self._write, args=(state,), name="lftpipe-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises
        ------
        OSError
            If it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def restore(self) -> None:
        """Let the runs go on from it, if it is there.

        Raises
        ------
        RunError
            If it is damaged.
        """
        if not self._path.exists():
            return
        device = self._runs[0].device
        try:
            states = torch.load(self._path, weights_only=True, map_location=device)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(
                f"damaged {self._path}", "a checkpoint", "start the run again with --force"
            ) from error
        for run, state in zip(self._runs, states, strict=True):
            run.restore(state)

    def drop(self) -> None:
        """The runs are finished: nothing has to go on."""
        self.wait()
        if processes.rank() == 0:
            self._path.unlink(missing_ok=True)

    def _write(self, state: list[dict[str, Any]]) -> None:
        try:
            self._path.parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            torch.save(state, content)
            write_atomic(self._path, content.getvalue())
        except BaseException as error:  # whatever it is, training hears of it
            self._error = error


def _copied(value: Any) -> Any:
    """Nested tensors in memory that training leaves alone."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
