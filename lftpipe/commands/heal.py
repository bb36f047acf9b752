"""`lftpipe heal`: train a run's layers together with the layers after them, or with the whole student."""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from lftpipe import runs
from lftpipe.base.device import dtype_name, on_device, resolve_compute_dtype
from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.base.outputs import one_writer
from lftpipe.base.workspace import find_runs, find_store, next_command, run_path
from lftpipe.config.loss import ON_STORED_LOGITS
from lftpipe.config.settings import ComputeDtype, HealSettings
from lftpipe.results.outcomes import Healing
from lftpipe.runs import Run
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training import distributed
from lftpipe.training.checkpoint import begin, is_finished, refuse_foreign
from lftpipe.training.healing import HealingRun
from lftpipe.training.log import check_tracker
from lftpipe.training.loop import Learner, train_together
from lftpipe.training.validate import check_patience

#: Peak learning rates, where none is given.
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


@on_device
def heal(settings: HealSettings) -> Healing:
    """Train a finished run's student further, and write it as a run of its own.

    `settings`: which run, what of its student is trained, and where the new run goes.
    Raises `LftpipeError` if the run, the store or the settings do not allow it, or training diverges.
    """
    distributed.join(settings.device)
    try:
        store_path = find_store(settings.workspace, settings.store)
        store = Store.open(store_path)
        store.need_whole("heal")
        source = _find(store_path, settings.target)
        settings = _resolved(settings, source, store)
        teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
        check_tracker(settings)
        folder = run_path(store_path, settings.run or f"{source.path.name}-healed")
        settings = replace(settings, target=str(source.path))
        with ExitStack() as locks:
            if distributed.rank() == 0:
                if folder.resolve() == source.path.resolve():
                    raise SettingsError(
                        f"--run {folder}, the run that is healed", "a new name", "give another"
                    )
                refuse_foreign(folder, settings)
                locks.enter_context(one_writer(folder))
            return _healed(folder, settings, source, store, teacher)
    finally:
        distributed.leave()


def _healed(folder: Path, settings: HealSettings, source: Run, store: Store, teacher: Teacher) -> Healing:
    """What is left to do of a run whose only writer this process is."""
    outcome = Healing(
        run=str(folder),
        store=str(store.path),
        healed=str(source.path),
        block=list(source.block),
        shape=source.shape,
    )
    digest = source.weights_digest
    if distributed.agree(is_finished(folder, settings, store, digest) if distributed.rank() == 0 else None):
        return replace(outcome, already_finished=True)
    run = HealingRun(folder, settings, source, store, teacher)
    learner = Learner(run)
    if distributed.rank() == 0:  # all that could be refused was looked at
        begin(folder, settings, store, digest)
    (ended,) = train_together([learner], resume=settings.resume, verb="heal")
    best = run.weights.best_loss
    return replace(
        outcome,
        objective=ended.objective,
        train_tokens=ended.train_tokens,
        steps=ended.steps,
        loss=ended.loss,
        held_back_loss=None if math.isinf(best) else best,
        seconds=ended.seconds,
        tokens_per_second=ended.tokens_per_second,
    )


def _find(store_path: Path, target: str | None) -> Run:
    """The run to heal: the one that was named, or the only one that no healing made."""
    if target is not None:
        return runs.open_run(find_runs(store_path, (target,))[0])
    found = [run for run in runs.open_runs(find_runs(store_path, ())) if run.healed is None]
    if len(found) != 1:
        names = ", ".join(run.path.name for run in found)
        raise RunError(
            f"{len(found)} runs beside {store_path}: {names}", "the one to heal", "name it: lftpipe heal RUN"
        )
    return found[0]


def _resolved(settings: HealSettings, source: Run, store: Store) -> HealSettings:
    """Settings with all that was left open chosen, and checked against the student and the store."""
    if store.fingerprint != source.store_fingerprint and store.origin != source.store_origin:
        raise RunError(
            f"{source.path}, trained from another store than {store.path}",
            "a run of this store",
            "name the run's store with --store",
        )
    check_patience(settings)
    if settings.loss in ON_STORED_LOGITS and not store.spec.logits:
        raise SettingsError(
            f"--loss {settings.loss} on store {store.path} without logits",
            "a store with the teacher's largest logits",
            "extract --force with --logits 64, or use --loss logits",
        )
    (m, n), last = source.block, store.identity["teacher"]["layers"]
    stops = [*(part.start for part in source.parts[1:]), last]
    if settings.train == "tail" and all(
        part.stop == stop for part, stop in zip(source.parts, stops, strict=True)
    ):
        raise SettingsError(
            f"--train tail for {source.shape} of {last} layers",
            "a layer after a block",
            "use --train student",
        )
    if settings.train == "tail" and source.starts_at < m:
        raise SettingsError(
            f"--train tail for {source.path}, whose first layers were healed",
            "the whole student: the cached states are no longer what its block reads",
            "use --train student",
        )
    if settings.train == "tail" and m not in store.layers:
        raise StoreError(f"store {store.path} without state {m}", "it", f"extract with --layers {m},{n}")
    if settings.loss == "logits" and not [each for each in store.layers if each >= n]:
        raise StoreError(
            f"store {store.path} without a state from {n} on",
            "one that the teacher's logits are computed from",
            f"extract with --layers {m},{n}",
        )
    if store.num_sequences("train") == 0:
        raise StoreError(f"store {store.path} without training sequences", "some", "extract more --tokens")
    dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
    rate = settings.learning_rate
    return replace(
        settings,
        threads=torch.get_num_threads(),
        compute_dtype=cast(ComputeDtype, dtype_name(dtype)),
        learning_rate=LEARNING_RATES[settings.adapter] if rate is None else rate,
    )


def summary(result: Healing) -> str:
    """What was made, where, and what to type next."""
    lines = [f"{result.run}: {result.healed}, healed"]
    if result.already_finished:
        return "\n".join([*lines, "  it was finished already: nothing was computed"])
    held = result.held_back_loss
    told = "" if held is None else f", {held:.4f} on what was held back"
    lines.append(
        f"  {result.train_tokens:,} tokens in {result.seconds:.0f} s, "
        f"{result.tokens_per_second:,.0f} tokens/s, last loss {result.loss:.4f}{told}"
    )
    lines.append(next_command("evaluate", result.healed, result.run, "--store", result.store))
    return "\n".join(lines)
