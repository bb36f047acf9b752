"""Checkpoints: all that a killed run needs to go on, in one file for runs that are trained jointly."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lftpipe import runs
from lftpipe.errors import RunError
from lftpipe.files import write_atomic
from lftpipe.training import processes
from lftpipe.training.run import TrainingRun


def checkpoint_of(joint: Sequence[TrainingRun]) -> Path:
    """Where the checkpoint of these runs lies: in the first one's folder.

    Parameters
    ----------
    joint
        Runs that are trained jointly.
    """
    return joint[0].folder / runs.CHECKPOINT


def save(joint: Sequence[TrainingRun]) -> None:
    """Write the state of these runs, whole or not at all.

    Parameters
    ----------
    joint
        Runs that are trained jointly.
    """
    if processes.rank() != 0:
        return
    path = checkpoint_of(joint)
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    torch.save([run.state() for run in joint], content)
    write_atomic(path, content.getvalue())


def restore(joint: Sequence[TrainingRun]) -> None:
    """Let these runs go on from their checkpoint, if there is one.

    Parameters
    ----------
    joint
        Runs that are trained jointly.

    Raises
    ------
    RunError
        If the checkpoint is damaged.
    """
    path = checkpoint_of(joint)
    if not path.exists():
        return
    for run, state in zip(joint, _load(path, joint[0].device), strict=True):
        run.restore(state)


def _load(path: Path, device: torch.device) -> list[dict[str, Any]]:
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"damaged {path}", "a checkpoint", "start the run again with --force") from error
