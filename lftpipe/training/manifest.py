"""What a finished run says of itself, apart from its weights."""

from typing import Any

import torch

import lftpipe
from lftpipe.config.objectives import CLOSED_FORM
from lftpipe.config.settings import TrainSettings, loss_text
from lftpipe.errors import RunError
from lftpipe.files import fingerprint
from lftpipe.objects import url_of
from lftpipe.store import Store
from lftpipe.teacher.recorded import record_of


def manifest_of(
    settings: TrainSettings, store: Store, block: tuple[int, int], velocity: dict[str, Any]
) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises
    ------
    LftpipeError
        If the store is no longer the one that the run was begun on.
    """
    now = Store.open(store.path)
    if now.fingerprint != store.fingerprint and now.origin != store.origin:
        raise RunError(
            f"{store.path}, which was made again while a run was trained on it",
            "the store that the run was begun on",
            "train the run again with --force",
        )
    return {
        "store_fingerprint": store.fingerprint,
        "store_origin": store.origin,
        # As it was typed: a pushed run is not to tell where somebody's home is.
        "store": url_of(store.shards.where) or str(store.path),
        "teacher": record_of(store.identity),
        "block": list(block),
        "objective": settings.objective,
        "loss": None if settings.objective in CLOSED_FORM else loss_text(settings),
        "solver": settings.solver if velocity["time"] else "euler",
        "walk_steps": settings.walk_steps if velocity["time"] else 1,
        "seed": settings.seed,
        "optimizer": settings.optimizer,
        "compute_dtype": settings.compute_dtype,
        "velocity": velocity,
        "versions": {"lftpipe": lftpipe.__version__, "torch": torch.__version__},
    }


def of_student(names: list[str], settings: TrainSettings, store: Store) -> dict[str, Any]:
    """What the manifests of all runs of a joint student say alike: their names, and a mark of their own."""
    keys = ("objective", "loss", "seed", "tokens", "batch_tokens", "learning_rate", "optimizer")
    alike = [names, store.origin, *(str(getattr(settings, key)) for key in keys)]
    return {"joint": names, "student": fingerprint(alike)}
