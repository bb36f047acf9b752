"""Checkpoints of runs: written at once, found again, and what a resumed run may change."""

import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lftpipe import runs
from lftpipe.base.errors import RunError
from lftpipe.base.files import fingerprint, write_atomic
from lftpipe.base.outputs import LOCK
from lftpipe.config.settings import HealSettings, TrainSettings, to_json
from lftpipe.store import Store
from lftpipe.training import distributed
from lftpipe.training.run import ModuleTraining

# --- Checkpoints: all that a killed run needs to go on, in one file.

#: The checkpoint before the newest.
BEFORE = "before.pt"

MAGIC = b"LFTPIPE1"


class Checkpoint:
    """The checkpoint of a run, in its folder.

    It is written by a thread while training goes on, whole or not at all. Of several processes only the first
    writes.

    `written`: is told the step of every checkpoint that is on the disk.
    """

    def __init__(self, run: ModuleTraining, written: Callable[[int], object] = lambda _: None) -> None:
        self._run, self._written = run, written
        self._path: Path = run.folder / runs.CHECKPOINT
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self) -> None:
        """Begin to write the run's state as it is now.

        Raises `OSError` if the one before could not be written.
        """
        if distributed.rank() != 0:
            return
        self.wait()
        state = _copied(self._run.state())
        self._thread = threading.Thread(target=self._write, args=(state,), name="lftpipe-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def restore(self) -> None:
        """Let the run go on from it, if it is there; from the one before, with a word, if it is damaged.

        Raises `RunError` if both are damaged, or of another run.
        """
        there = [path for path in (self._path, self._path.with_name(BEFORE)) if path.exists()]
        for path in there:
            try:
                state = read_checkpoint(path, self._binding(), self._run.device)
                self._run.restore(state)
            except ValueError as error:
                _say(f"{path}: {error}; " + ("trying the one before" if path != there[-1] else "no other"))
                continue
            if path != self._path:
                _say(f"going on from {path}, step {state['step']}")
            return
        if there:
            raise RunError(f"damaged {self._path}", "a checkpoint", "start the run again with --force")

    def drop(self) -> None:
        """The run is finished: nothing has to go on."""
        self.wait()
        if distributed.rank() == 0:
            drop_checkpoints(self._run.folder)

    def _binding(self) -> str:
        """Digest over what the run is: block, objective, seed, loss, and its store."""
        return fingerprint(self._run.identity())

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self._path.parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            torch.save(state, content)
            sealed = seal_checkpoint(content.getbuffer(), self._binding())
            write_atomic(self._path, sealed, keep=self._path.with_name(BEFORE))
            self._written(state["step"])
        except BaseException as error:  # whatever it is, training hears of it
            self._error = error


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, file=sys.stderr)


def seal_checkpoint(content: bytes | memoryview, binding: str) -> bytes:
    """The content after a digest of itself and of what it is bound to."""
    bound = MAGIC + bytes.fromhex(binding) + xxhash.xxh3_128_digest(content)
    return bound + content


def read_checkpoint(path: Path, binding: str | None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint.

    `binding`: digest of the run that it must belong to; None takes any.
    Raises `ValueError` if it is damaged or of another run.
    """
    data = path.read_bytes()
    sealed, digest, content = data[8:24], data[24:40], data[40:]
    if not data.startswith(MAGIC):
        raise ValueError("it is no checkpoint")
    if xxhash.xxh3_128_digest(content) != digest:
        raise ValueError("its digest does not match its content")
    if binding is not None and sealed.hex() != binding:
        raise ValueError("it is of a run with other settings or of another store")
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    except Exception as error:  # a digest finds accidents: whoever writes a checkpoint by hand can seal it
        raise ValueError("it is no checkpoint") from error


def drop_checkpoints(run: Path) -> None:
    """Remove a run's checkpoints, and their folder if nothing else is in it."""
    newest = run / runs.CHECKPOINT
    for path in (newest, newest.with_name(BEFORE), newest.with_name(f"{newest.name}.partial")):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds something of someone else
        newest.parent.rmdir()


def _copied(value: Any) -> Any:
    """Nested tensors in memory that training leaves alone."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


# --- A run's folder: claimed for a new run, or for one to go on with, never for another one by accident.

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

    `healed`: digest of the weights that are healed, if any are.
    Raises `RunError` if the folder holds a run of other settings, or an unfinished one and `resume` is not
    set.
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

    `healed`: digest of the weights that are healed, if any are.
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

    `run`: the folder; one that is not there, or is empty, is free.
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
    return all(mark in content for mark in (b'"parts"', b'"weights_digest"', b'"walk_steps"'))


def changed_settings(
    run: Path, settings: TrainSettings | HealSettings, store: Store, healed: str | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Setting, value with which the run was begun, and value now, of all that would give another run.

    `healed`: digest of the weights that are to be healed now.
    """
    before, record = runs.read_settings(run)
    before |= {"store fingerprint": record["fingerprint"], "healed weights": record.get("healed", healed)}
    now = to_json(settings) | {"store fingerprint": store.fingerprint, "healed weights": healed}
    for key in sorted((before.keys() | now.keys()) - _MAY_DIFFER):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)
