"""`lftpipe compress`: from a model to a smaller one, all stages in one command, each as if typed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import RunError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.extract import extract
from lftpipe.commands.plan import check_budget, plan
from lftpipe.commands.report import report
from lftpipe.commands.train import train
from lftpipe.config.settings import (
    CompressSettings,
    EvaluateSettings,
    ExportSettings,
    ExtractSettings,
    Objective,
    PlanSettings,
    ReportSettings,
    TrainSettings,
    recorded,
)
from lftpipe.planning.library import stillest_block
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Compressed
from lftpipe.results.plan import Plan
from lftpipe.results.run import SOURCE
from lftpipe.store import Store
from lftpipe.teacher.source import max_positions_of, open_recorded, open_teacher, record_of
from lftpipe.teacher.tail import count_layer_parameters

#: Validation tokens, as a fraction of the training tokens, between these two.
VALIDATION, LEAST, MOST = 0.1, 4096, 40_192

#: Tokens of a sequence, or as many as the teacher takes.
CONTEXT = 512

#: Tokens of a step of the student.
BATCH = 512


@on_device
def compress(settings: CompressSettings) -> Compressed:
    """Extract, plan, train, evaluate, export and report; what was finished before stays.

    `settings`: which model, how small, and where the checkpoint goes.
    Raises `LftpipeError`: whatever a stage raises.
    """
    check_budget(settings)
    shared = {name: getattr(settings, name) for name in ("workspace", "device", "threads")}
    validation = min(MOST, max(LEAST, round(VALIDATION * settings.tokens)))
    most = max_positions_of(open_teacher(settings.model, settings.workspace).config) or CONTEXT
    made = extract(
        ExtractSettings(
            **shared,
            model=settings.model,
            corpus=settings.corpus,
            context=min(CONTEXT, most),
            tokens=settings.tokens,
            validation_tokens=validation,
            attention=False,
        )
    )
    store_path = Path(made.store)
    shared |= {"store": store_path, "seed": settings.seed}
    found, path = _planned(settings, shared, store_path)
    name = path.stem.removeprefix("plan-")
    common = {**shared, "tokens": settings.tokens, "batch_tokens": BATCH, "resume": True}
    student = train(TrainSettings(**common, plan=path, run=f"{name}-seed{settings.seed}")).runs[0]
    others = _baselines(found, store_path, settings, common)
    scored = evaluate(
        EvaluateSettings(
            **{key: value for key, value in shared.items() if key != "seed"},
            runs=tuple(Path(run).name for run in (student.run, *others)),
            k=(1,),
            skips=(),
            force=True,
        )
    )
    out = settings.out or store_path.parent / "student"
    exported = _exported(settings, student.run, out)
    page = report(ReportSettings(workspace=settings.workspace, store=store_path, force=True))
    return Compressed(
        out=exported.out,
        form=exported.form,
        shape=student.shape,
        plan=str(path),
        run=student.run,
        report=page.report,
        results=scored.results,
    )


def _planned(settings: CompressSettings, shared: dict[str, Any], store_path: Path) -> tuple[Plan, Path]:
    """The plan for the budget: the one that is there if it was made with these settings, or a new one."""
    budget = {name: getattr(settings, name) for name in ("size", "layers", "speed")}
    name = next((f"{key}{value:g}" for key, value in budget.items() if value is not None), "size0.7")
    path = store_path.parent / f"plan-{name}.json"
    wanted = PlanSettings(**shared, **budget, minutes=settings.minutes, out=path, force=settings.force)
    # A small corpus still needs the two sequences that a score's standard error is of.
    least = 2 / Store.open(store_path).num_sequences("train")
    wanted = replace(wanted, hold_back=max(wanted.hold_back, min(least, 0.5)))
    if path.is_file() and not settings.force:
        found = Plan.from_json(path)
        if found.store == Store.open(store_path).fingerprint and found.settings == recorded(wanted):
            return found, path
        raise RunError(
            f"{path}, a plan of another store or with other settings",
            "the settings that it was begun with",
            "use the same settings, or --force to plan again",
        )
    return plan(wanted).plan, path


def _baselines(
    found: Plan, store_path: Path, settings: CompressSettings, common: dict[str, Any]
) -> list[str]:
    """Runs of as many parameters or fewer: some layers left out, and one layer in place of one more."""
    store = Store.open(store_path)
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    saved = found.cost.parameters - found.choice.cost.parameters
    fewer = math.ceil(saved / count_layer_parameters(teacher))
    runs: list[str] = []
    others: tuple[tuple[Objective, int], ...] = (("skip", fewer), ("regression", fewer + 1))
    for objective, length in others:
        if 0 < length < teacher.num_layers:
            m, n = stillest_block(teacher, store, settings.device, length)
            one = TrainSettings(**common, block=f"{m}:{n}", objective=objective)
            runs.append(train(one).runs[0].run)
    return runs


def _exported(settings: CompressSettings, run: str, out: Path) -> Any:
    """The checkpoint: plain where that is exact, else latent-flow."""
    ours = (out / SOURCE).is_file()
    given = ExportSettings(workspace=settings.workspace, runs=(run,), out=out, force=settings.force or ours)
    try:
        return export(replace(given, form="plain"))
    except RunError as error:
        progress.say(f"note: no plain checkpoint: {error}")
        return export(given)


def summary(result: Compressed) -> FittedTable:
    """One table, the checkpoint's path, and how to load it."""
    rows = [
        [row.run or row.method, row.shape or "", f"{row.parameters:,}", _digits(row.kl), _digits(row.ppl)]
        for row in result.results.rows
        if row.run or row.method == "teacher"
    ]
    trust = "" if result.form == "plain" else ", trust_remote_code=True"
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{result.out}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{result.out}")',
    ]
    return FittedTable(
        [
            Column("", "left", folds=True, needed=True),
            Column("shape", "left", folds=True),
            Column("parameters", needed=True),
            Column("KL", needed=True),
            Column("PPL", needed=True),
        ],
        rows,
        title=f"{result.results.teacher}: {result.results.validation_tokens:,} validation tokens",
        caption="\n".join([f"written to {result.out}, {result.form}", *load]),
        complete=result.report,
    )


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
