"""`lftpipe train`: learn flow layers for blocks, from the cache or from the live teacher."""

from dataclasses import replace
from pathlib import Path

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import SettingsError
from lftpipe.base.workspace import find_store, next_command, run_path
from lftpipe.config.layers import parse_block
from lftpipe.config.settings import TrainSettings, depth_of, width_of
from lftpipe.results.outcomes import TrainedRun, Training
from lftpipe.results.plan import Plan
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training import distributed
from lftpipe.training.several import check_together, train_apart, train_runs
from lftpipe.training.validate import Wanted, resolved, run_name, variants_of


@on_device
def train(settings: TrainSettings) -> Training:
    """Train a flow layer and write its run; or several, from the same batches.

    `settings`: what is trained, on which store, and where the run goes.
    Raises `LftpipeError` if the store, block or settings do not allow it, or training diverges.
    """
    distributed.join(settings.device)
    try:
        store_path = find_store(settings.workspace, settings.store)
        store = Store.open(store_path)
        teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
        wanted = []
        for variant in variants_of(settings):
            wanted += _wanted(variant, settings, store, teacher)
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
    if distributed.count() > 1:
        raise SettingsError("--workers with torchrun", "one of the two", "leave out --workers")
    check_together(wanted)
    count = min(settings.workers, len(wanted))
    groups = [wanted[number::count] for number in range(count)]
    with progress.task("train in processes", len(wanted), "runs") as task:
        found = train_apart(groups, store, teacher, workers=count, advance=task.advance)
    by_name = {result.run: result for result in found}
    return [by_name[str(run)] for run, _, _ in wanted]


def _wanted(variant: TrainSettings, settings: TrainSettings, store: Store, teacher: Teacher) -> list[Wanted]:
    """The runs of one variant: one for each block, or one for a student of all blocks."""
    if variant.plan is not None:
        variant = _planned(variant, variant.plan, store)
    if variant.block == "each":
        variant = replace(variant, joint=True)
        blocks = [(index, index + 1) for index in range(teacher.num_layers)]
    else:
        blocks = [_block(each, variant, store.path, teacher) for each in variant.block.split(",")]
    for option in ("depth", "width"):
        _check_number(variant, option, len(blocks))
    students = [blocks] if variant.joint else [[block] for block in blocks]
    found: list[Wanted] = []
    for number, student in enumerate(students):
        alone = (
            {}
            if variant.joint
            else {"depth": depth_of(variant, number), "width": (width_of(variant, number),)}
        )
        one = resolved(replace(variant, **alone), store, student, teacher)
        name = variant.run or run_name(one, student)
        if variant.run and (settings.variants or len(students) > 1):  # a run holds one student
            name += (
                "".join(f"-{m}-{n}" for m, n in student) if len(student) < 3 else f"-{len(student)}-blocks"
            )
        if settings.variants:  # the same recipe may be trained with several seeds
            name += f"-seed{variant.seed}"
        found.append((run_path(store.path, name), one, student))
    return found


def _planned(settings: TrainSettings, path: Path, store: Store) -> TrainSettings:
    """The settings of a plan's shape, which make the same run again without the plan."""
    if not path.is_file():
        raise SettingsError(f"--plan {path}", "an existing plan", "make it with `lftpipe plan`")
    plan = Plan.from_json(path)
    if plan.store != store.fingerprint:
        raise SettingsError(
            f"--plan {path}, of another store than {store.path}",
            "a plan of this store",
            "name its store with --store, or plan again",
        )
    parts = plan.choice.parts
    if not parts:
        raise SettingsError(f"--plan {path}, which keeps the whole teacher", "a smaller budget", "plan again")
    return replace(
        settings,
        plan=None,
        joint=True,
        objective="distil",
        block=",".join(f"{part.start}:{part.stop}" for part in parts),
        depth=tuple(0 if part.kind == "skip" else part.depth for part in parts),
        width=tuple(part.width for part in parts),
        run=settings.run or f"plan-seed{settings.seed}",
    )


def _check_number(settings: TrainSettings, option: str, blocks: int) -> None:
    """Refuse a `--depth` or `--width` of several numbers that are not as many as the blocks."""
    values = getattr(settings, option)
    if isinstance(values, tuple) and len(values) not in (1, blocks):
        given = ",".join(f"{value:g}" for value in values)
        raise SettingsError(
            f"--{option} {given} for {'one block' if blocks == 1 else f'{blocks} blocks'}",
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
    lines = [f"{run.run}: {run.objective}, {run.shape}"]
    if run.already_finished:
        return "\n".join([*lines, "  it was finished already: nothing was computed"])
    speed = "" if run.tokens_per_second is None else f", {run.tokens_per_second:,.0f} tokens/s"
    loss = "" if run.loss is None else f", last loss {run.loss:.4f}"
    lines.append(f"  {run.train_tokens:,} tokens in {run.seconds:.0f} s{speed}{loss}")
    lines.append(next_command("evaluate", run.run, "--store", store))
    return "\n".join(lines)
