"""`lftpipe train`: learn flow layers for blocks, from the cache or from the live teacher."""

from dataclasses import replace
from pathlib import Path

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import SettingsError
from lftpipe.base.workspace import find_store, next_command, run_path
from lftpipe.config.layers import parse_block
from lftpipe.config.settings import TrainSettings, depth_of
from lftpipe.results.outcomes import TrainedRun, Training
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training import distributed
from lftpipe.training.joint import check_together, train_runs
from lftpipe.training.parallel import train_apart
from lftpipe.training.validate import Wanted, resolved, run_name, variants_of


@on_device
def train(settings: TrainSettings) -> Training:
    """Train a flow layer and write its run; or several, from the same batches.

    Parameters
    ----------
    settings
        What is trained, on which store, and where the run goes.

    Raises
    ------
    LftpipeError
        If the store, block or settings do not allow it, or training diverges.
    """
    distributed.join(settings.device)
    try:
        store_path = find_store(settings.workspace, settings.store)
        store = Store.open(store_path)
        teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
        wanted = []
        for variant in variants_of(settings):
            blocks = [_block(each, variant, store_path, teacher) for each in variant.block.split(",")]
            _check_depths(variant, len(blocks))
            for index, block in enumerate(blocks):
                one = resolved(replace(variant, depth=depth_of(variant, index)), store, block, teacher)
                name = variant.run or run_name(one, block)
                if variant.run and (settings.variants or len(blocks) > 1):  # a run holds one flow layer
                    name += f"-{block[0]}-{block[1]}"
                if settings.variants:  # the same recipe may be trained with several seeds
                    name += f"-seed{variant.seed}"
                wanted.append((run_path(store_path, name), one, block))
        if settings.workers == 1 or len(wanted) == 1:
            results = train_runs(wanted, store, teacher)
        else:
            results = _in_processes(wanted, settings, store, teacher)
    finally:
        distributed.leave()
    return Training(runs=results, store=str(store_path))


def _in_processes(
    wanted: list[Wanted], settings: TrainSettings, store: Store, teacher: Teacher
) -> list[TrainedRun]:
    """Each process trains its part of the runs from the same batches."""
    joint = any(one.joint for _, one, _ in wanted)
    if joint or distributed.count() > 1:
        other = "--joint" if joint else "torchrun"
        raise SettingsError(f"--workers with {other}", "one of the two", "leave out --workers")
    check_together(wanted)
    count = min(settings.workers, len(wanted))
    groups = [wanted[number::count] for number in range(count)]
    with progress.task("train in processes", len(wanted), "runs") as task:
        found = train_apart(groups, store, teacher, workers=count, advance=task.advance)
    by_name = {result.run: result for result in found}
    return [by_name[str(run)] for run, _, _ in wanted]


def _check_depths(settings: TrainSettings, blocks: int) -> None:
    """Refuse a `--depth` of several numbers that are not as many as the blocks."""
    if isinstance(settings.depth, tuple) and len(settings.depth) not in (1, blocks):
        given = ",".join(map(str, settings.depth))
        raise SettingsError(
            f"--depth {given} for {'one block' if blocks == 1 else f'{blocks} blocks'}",
            "one number, or as many as there are blocks",
            "give one for each --block, in the same order",
        )


def _block(text: str, settings: TrainSettings, store_path: Path, teacher: Teacher) -> tuple[int, int]:
    if text == "auto":
        from lftpipe.recoupling.stored_map import choose_block

        return distributed.agree(choose_block(store_path, settings) if distributed.rank() == 0 else None)
    return parse_block(text, teacher.num_layers)


def summary(result: Training) -> str:
    """What was made, where, and what to type next."""
    return "\n".join(_lines(run, result.store) for run in result.runs)


def _lines(run: TrainedRun, store: str) -> str:
    m, n = run.block
    lines = [f"{run.run}: {run.objective} flow layer for layers {m} to {n - 1}"]
    if run.already_finished:
        return "\n".join([*lines, "  it was finished already: nothing was computed"])
    speed = "" if run.tokens_per_second is None else f", {run.tokens_per_second:,.0f} tokens/s"
    loss = "" if run.loss is None else f", last loss {run.loss:.4f}"
    lines.append(f"  {run.train_tokens:,} tokens in {run.seconds:.0f} s{speed}{loss}")
    student = run.joint or [run.run]
    if run.run == student[-1]:
        lines.append(next_command("evaluate", *student, "--store", store))
    return "\n".join(lines)
