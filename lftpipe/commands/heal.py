"""`lftpipe heal`: train a run's layer together with the layers after it, or with the whole student.

A student of several flow layers is healed as one, into as many runs.
"""

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
from lftpipe.training.healing import HealingRun, Part
from lftpipe.training.log import check_tracker
from lftpipe.training.loop import Chain, train_together
from lftpipe.training.validate import check_patience

#: Peak learning rates, where none is given.
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


@on_device
def heal(settings: HealSettings) -> Healing:
    """Train a finished run's student further, and write it as a run of its own.

    Parameters
    ----------
    settings
        Which run, what of its student is trained, and where the new run goes.

    Raises
    ------
    LftpipeError
        If the run, the store or the settings do not allow it, or training diverges.
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
        new: list[Part] = []
        for run in source:
            folder = run_path(store_path, _name(settings, run, source))
            new.append(Part(folder, replace(settings, target=str(run.path)), run))
        with ExitStack() as locks:
            if distributed.rank() == 0:
                _claim(new, source, locks)
            return _healed(new, store, teacher)
    finally:
        distributed.leave()


def _claim(new: list[Part], source: list[Run], locks: ExitStack) -> None:
    """Be the only writer of the new runs' folders; refuse what must not be overwritten."""
    for part in new:
        if part.folder.resolve() in {run.path.resolve() for run in source}:
            raise SettingsError(f"--run {part.folder}, the run that is healed", "a new name", "give another")
    for part in new:
        refuse_foreign(part.folder, part.settings)
    for part in new:
        locks.enter_context(one_writer(part.folder))


def _healed(new: list[Part], store: Store, teacher: Teacher) -> Healing:
    """What is left to do of runs whose only writer this process is."""
    folder, settings, source = new[0]
    outcome = Healing(
        run=str(folder),
        store=str(store.path),
        healed=str(source.path),
        block=list(source.block),
        joint=[str(part.folder) for part in new] if len(new) > 1 else None,
    )
    if distributed.agree(_are_finished(new, store) if distributed.rank() == 0 else None):
        return replace(outcome, already_finished=True)
    run = HealingRun(new, store, teacher)
    chain = Chain([run])
    if distributed.rank() == 0:  # all that could be refused was looked at
        for part in new:
            begin(part.folder, part.settings, store, part.source.weights_digest)
    (ended,) = train_together([chain], resume=settings.resume, verb="heal")
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


def _are_finished(new: list[Part], store: Store) -> bool:
    """Whether all runs are there already; refuses folders that hold something else."""
    folders = [part.folder for part in new]
    there = [(folder / runs.MANIFEST).exists() for folder in folders]
    begun = (folders[0] / runs.SETTINGS).exists()
    if any(there) and not new[0].settings.force:
        # The first manifest is written last: others without it are of a killed healing, if one had begun.
        strange = not all(there) if there[0] else not begun
        if strange or (all(there) and [run.path for run in runs.open_student(folders[0])] != folders):
            raise RunError(
                f"a finished run {folders[there.index(True)]}, but no student of it and what is beside it",
                "all runs of a healed student, or none",
                "use a new --run NAME, or --force",
            )
    finished = [is_finished(part.folder, part.settings, store, part.source.weights_digest) for part in new]
    return all(finished)


def _find(store_path: Path, target: str | None) -> list[Run]:
    """The student to heal, run by run: the one that was named, or the only one that no healing made."""
    if target is not None:
        return runs.open_student(find_runs(store_path, (target,))[0])
    paths = [path for path in find_runs(store_path, ()) if runs.open_run(path).healed is None]
    found = runs.open_students(paths)
    if len(found) != 1:
        raise RunError(
            f"{len(paths)} runs beside {store_path}: {', '.join(path.name for path in paths)}",
            "the one to heal",
            "name it: lftpipe heal RUN",
        )
    return found[0]


def _name(settings: HealSettings, run: Run, student: list[Run]) -> str:
    """What a new run is called; several of one `--run NAME` have their blocks in their names."""
    if settings.run is None:
        return f"{run.path.name}-healed"
    m, n = run.block
    return settings.run if len(student) == 1 else f"{settings.run}-{m}-{n}"


def _resolved(settings: HealSettings, student: list[Run], store: Store) -> HealSettings:
    """Settings with all that was left open chosen, and checked against the student and the store."""
    source = student[0]
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
    m, n, last = source.block[0], student[-1].block[1], store.identity["teacher"]["layers"]
    stops = [*(run.block[0] for run in student[1:]), last]
    if settings.train == "tail" and all(
        run.block[1] == stop for run, stop in zip(student, stops, strict=True)
    ):
        blocks = ",".join(f"{run.block[0]}:{run.block[1]}" for run in student)
        raise SettingsError(
            f"--train tail for block {blocks} of {last} layers",
            "a layer after the block",
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
