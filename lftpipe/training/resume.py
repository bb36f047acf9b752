"""A run's folder: claimed for a new run, or for one to go on with, never for another one by accident."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.config.settings import HealSettings, TrainSettings, to_json
from lftpipe.errors import RunError
from lftpipe.outputs import LOCK
from lftpipe.store import Store
from lftpipe.training.checkpoint import drop_checkpoints

#: What may be in a folder whose run was killed before it had begun.
_OF_A_KILLED_START = {LOCK, f"{runs.SETTINGS}.partial"}

#: Settings that do not change a run's numbers, or that a resumed run may change. On another device, or with
#: another number of threads, it ends with other bits.
_MAY_DIFFER = {
    "resume",
    "force",
    "workspace",
    "store",
    "cache",
    "cache_bytes",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "run",
    "rank_by",
    "variants",
    "tensorboard",
    "track",
    "device",
    "threads",
    "workers",
    "target",  # of a healing: a path, which may be written in several ways; its weights' digest counts
}


#: Settings that a diverged run may be resumed with, changed; its `metrics.jsonl` shows from which step on.
_MAY_BE_TAMED = {"learning_rate", "clip"}


def is_finished(
    run: Path, settings: TrainSettings | HealSettings, store: Store, healed: str | None = None
) -> bool:
    """Whether a run is there already as it is wanted; what must not be overwritten is refused.

    Nothing that counts is changed: whatever else may be refused comes before `begin`.

    Parameters
    ----------
    healed
        Digest of the weights that are healed, if any are.

    Raises
    ------
    RunError
        If the folder holds a run of other settings, or an unfinished one and `resume` is not set.
    """
    refuse_foreign(run, settings)
    if settings.force or not (run / runs.SETTINGS).exists():
        return False
    for key, before, now in changed_settings(run, settings, store, healed):
        if key in _MAY_BE_TAMED and settings.resume and (run / runs.DIVERGED).exists():
            continue
        raise RunError(
            f"{key} = {now} for {run}",
            f"{key} = {before}, as it was begun",
            "use the same settings, start another run with --run NAME, or overwrite it with --force",
        )
    finished = (run / runs.MANIFEST).exists()
    if not finished and not settings.resume:
        raise RunError(
            f"unfinished run {run}", "--resume, or a new name", "pass --resume, or --force to restart"
        )
    if finished:
        drop_checkpoints(run)  # of a process that was killed just before it would have done so
    return finished


def begin(run: Path, settings: TrainSettings | HealSettings, store: Store, healed: str | None = None) -> None:
    """Make a run's folder ours, before the first thing is written there; with `--force` what was there goes.

    Parameters
    ----------
    healed
        Digest of the weights that are healed, if any are.
    """
    (run / runs.MANIFEST).unlink(missing_ok=True)  # of a student that was killed between two of them, too
    if settings.force:
        for name in (runs.METRICS, runs.WEIGHTS, runs.DIVERGED, runs.SAMPLES):
            (run / name).unlink(missing_ok=True)
        drop_checkpoints(run)
    table = "heal" if isinstance(settings, HealSettings) else "train"
    runs.write_settings(run, to_json(settings), store.fingerprint, table, healed)


def refuse_foreign(run: Path, settings: TrainSettings | HealSettings) -> None:
    """Refuse a folder that holds anything else than a run.

    Parameters
    ----------
    run
        The folder; one that is not there, or is empty, is free.
    """
    if not run.exists():
        return
    names = {entry.name for entry in run.iterdir()} - _OF_A_KILLED_START if run.is_dir() else {run.name}
    if not names or (run / runs.SETTINGS).is_file():
        return
    if not _is_run_manifest(run / runs.MANIFEST):
        raise RunError(
            f"{run}, which holds {min(names)} and no run", "a run or a new folder", "use --run NAME"
        )
    if not settings.force:
        raise RunError(
            f"finished run {run} that lost its {runs.SETTINGS}",
            "a run with its settings",
            "name another with --run, or overwrite it with --force",
        )


def _is_run_manifest(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        content = file.read(2**20)
    return all(mark in content for mark in (b'"velocity"', b'"weights_digest"', b'"walk_steps"'))


def changed_settings(
    run: Path, settings: TrainSettings | HealSettings, store: Store, healed: str | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Setting, value with which the run was begun, and value now, of all that would give another run.

    Parameters
    ----------
    healed
        Digest of the weights that are to be healed now.
    """
    before, record = runs.read_settings(run)
    # What an older version did not know was then as it is by default now.
    before = to_json(type(settings)()) | before
    before |= {"store fingerprint": record["fingerprint"], "healed weights": record.get("healed", healed)}
    now = to_json(settings) | {"store fingerprint": store.fingerprint, "healed weights": healed}
    for key in sorted((before.keys() | now.keys()) - _MAY_DIFFER):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)
