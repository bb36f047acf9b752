"""`lftpipe train`: learn one flow layer for one block, from the cache or from the live teacher."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lftpipe import runs
from lftpipe.compute import prepare_processor
from lftpipe.errors import RunError, SettingsError, StoreError, TeacherError
from lftpipe.settings import TrainSettings, parse_block, to_plain
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.training import Training, fit_linear
from lftpipe.workspace import find_store, run_path


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a flow layer and write its run.

    Returns
    -------
    dict
        Where the run is and how it ended, JSON-plain.

    Raises
    ------
    LftpipeError
        If the store, block or settings do not allow it, or training diverges.
    """
    prepare_processor(settings.threads)
    store_path = find_store(settings.workspace, settings.store)
    store = Store.open(store_path)
    teacher = teacher_of(store, settings.workspace)
    if settings.block == "auto":
        from lftpipe.stages.recouple import choose_block

        block = choose_block(store_path, settings)
    else:
        block = parse_block(settings.block, teacher.num_layers)
    settings = resolved(settings, store, block)
    run = run_path(store_path, settings.run or run_name(settings, block))
    return train_run(run, settings, store, teacher, block) | {"store": str(store_path)}


def train_run(
    run: Path, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> dict[str, Any]:
    """Train one run with `resolved` settings, or go on with it; a finished one is left as it is."""
    if _claim(run, settings, store):
        finished = runs.open_run(run)
        return {
            "run": str(run),
            "block": list(block),
            "objective": settings.objective,
            "train_tokens": finished.train_tokens,
            "already_finished": True,
        }
    torch.manual_seed(settings.seed)
    if settings.objective == "linear":
        return fit_linear(run, settings, store, teacher, block)
    return Training(run, settings, store, teacher, block).run()


def teacher_of(store: Store, workspace: Path) -> Teacher:
    """The teacher that a store was made with.

    Raises
    ------
    TeacherError
        If it is not found, or is no longer as it was when the store was made.
    """
    recorded = store.identity["teacher"]
    teacher = open_teacher(recorded["model"], workspace, revision=recorded["revision"])
    for part, digest in (("weights", teacher.checkpoint.digest), ("config", teacher.config_digest)):
        before = recorded.get(f"{part}_digest", digest)
        if digest != before:
            raise TeacherError(
                f"teacher {recorded['model']} whose {part} changed since {store.path} was made",
                f"{part} with digest {before[:12]}…",
                f"put the old {part} back, or extract again with --force",
            )
    return teacher


def resolved(settings: TrainSettings, store: Store, block: tuple[int, int]) -> TrainSettings:
    """Settings with all that was left open chosen, and checked against the store.

    Raises
    ------
    LftpipeError
        If the store lacks a state of the block or has nothing to train on, or the settings contradict.
    """
    m, n = block
    needed = range(m, n + 1) if settings.objective == "trajectory" else (m, n)
    absent = [l for l in needed if l not in store.layers]  # noqa: E741
    if absent and not settings.from_teacher:
        raise SettingsError(
            f"block {m}:{n}, which needs state {absent[0]}",
            f"states that the store holds: {_ranges(store.layers)}",
            f"choose another block, or extract with --layers {','.join(map(str, needed))}",
        )
    if settings.objective == "hybrid" and settings.alpha == 0:
        raise SettingsError("--objective hybrid --alpha 0", "a positive --alpha", "use --objective fw")
    if store.num_sequences("train") == 0:
        raise StoreError(
            f"store {store.path} without training sequences", "at least one", "extract with more --tokens"
        )
    # All settled here is recorded with the run, and compared when it is resumed.
    return replace(settings, block=f"{m}:{n}", threads=torch.get_num_threads())


def _ranges(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def run_name(settings: TrainSettings, block: tuple[int, int]) -> str:
    """What a run is called that was given no name: after block, objective and seed."""
    objective = settings.objective
    if objective in ("fw", "hybrid"):
        objective += str(settings.walk_steps) + ("" if settings.solver == "midpoint" else "-euler")
    return f"{block[0]}-{block[1]}-{objective}-seed{settings.seed}"


#: Settings that do not change a run's numbers, or that a resumed run may change.
_MAY_DIFFER = {"resume", "force", "workspace", "store", "log_every", "checkpoint_every", "run", "rank_by"}


def _claim(run: Path, settings: TrainSettings, store: Store) -> bool:
    """Make the run's folder ours: a new one, one to resume, or `--force`; True if it is finished already."""
    plain = to_plain(settings)
    if (run / runs.SETTINGS).exists() and not settings.force:
        for key, before, now in changed_settings(run, settings, store):
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
        return finished
    if settings.force:
        for name in (runs.MANIFEST, runs.METRICS, runs.CHECKPOINT, runs.WEIGHTS):
            (run / name).unlink(missing_ok=True)
    runs.write_settings(run, plain, store.fingerprint)
    return False


def changed_settings(run: Path, settings: TrainSettings, store: Store) -> Iterator[tuple[str, Any, Any]]:
    """Setting, value with which the run was begun, and value now, of all that would give another run."""
    before, fingerprint = runs.read_settings(run)
    before = before | {"store fingerprint": fingerprint}
    now = to_plain(settings) | {"store fingerprint": store.fingerprint}
    for key in sorted((before.keys() | now.keys()) - _MAY_DIFFER):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    m, n = result["block"]
    lines = [f"{result['run']}: {result['objective']} flow layer for layers {m} to {n - 1}"]
    if result.get("already_finished"):
        lines.append("  it was finished already: nothing was computed")
        return "\n".join(lines)
    speed = f", {result['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in result else ""
    loss = f", last loss {result['loss']:.4f}" if "loss" in result else ""
    lines.append(f"  {result['train_tokens']:,} tokens in {result['seconds']:.0f} s{speed}{loss}")
    lines.append(f"next: lftpipe evaluate {result['run']} --store {result['store']}")
    return "\n".join(lines)
