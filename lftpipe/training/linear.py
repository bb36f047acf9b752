"""The closed-form baseline: least squares from one pass over the training states."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from lftpipe import progress, runs
from lftpipe.config.settings import TrainSettings
from lftpipe.flow.linear import LeastSquares, LinearMap
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher
from lftpipe.training.run import manifest_of


def fit_linear(
    folder: Path, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> dict[str, Any]:
    """Fit and write a linear run; no steps.

    Parameters
    ----------
    folder
        The run's.
    settings
        Resolved ones.
    store
        What is read.
    teacher
        The store's.
    block
        Which layers the map stands for.

    Returns
    -------
    dict
        Where the run is and how long it took.
    """
    started = time.monotonic()
    m, n = block
    sums, seen = LeastSquares(teacher.width, teacher.width), 0
    sequences = min(store.num_sequences("train"), math.ceil(settings.tokens / store.context))
    with progress.task(f"train {folder.name}", sequences * store.context, "tokens") as task:
        for first in range(0, sequences, 8):
            rows = range(first, min(first + 8, sequences))
            x_0, x_1 = (torch.from_numpy(store.read("train", layer, rows)).float() for layer in (m, n))
            sums.add(x_0.double(), x_1 - x_0, x_1)
            seen += len(rows) * store.context
            task.advance(len(rows) * store.context)
    flow = LinearMap(teacher.width)
    weight, bias = sums.solve()
    flow.linear.load_state_dict({"weight": weight, "bias": bias})
    manifest = manifest_of(settings, store, block, {"linear": True, "time": False, "shift": False})
    runs.save_run(folder, flow, manifest | {"train_tokens": seen})
    return {
        "run": str(folder),
        "block": [m, n],
        "objective": "linear",
        "train_tokens": seen,
        "seconds": round(time.monotonic() - started, 3),
    }
