"""`lftpipe evaluate`: Table 1 and the curve of figure 5, from the cached validation states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lftpipe import runs
from lftpipe.config.layers import check_apart
from lftpipe.config.settings import EvaluateSettings, to_json
from lftpipe.device import prepare
from lftpipe.errors import RunError, SettingsError, StoreError
from lftpipe.evaluation.predictors import Row, run_rows, together_rows
from lftpipe.evaluation.scoring import score
from lftpipe.files import write_atomic
from lftpipe.flow.path import States
from lftpipe.report.tables import COLUMNS, adaptive_section, cell, markdown_table, means_section
from lftpipe.store import Store
from lftpipe.teacher.family import AttentionContext
from lftpipe.teacher.parts import count_layer_parameters, count_parameters
from lftpipe.teacher.recorded import open_recorded
from lftpipe.teacher.source import Teacher
from lftpipe.workspace import find_runs, find_store

#: Batches that every row is timed on.
TIMED_BATCHES = 3

METRICS = ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl")


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Score teacher, skips and runs over the whole validation split, and write the table.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    LftpipeError
        If a run is missing or of another store, or the store lacks a state.
    """
    prepare(settings.device, settings.threads)
    store_path = find_store(settings.workspace, settings.store)
    store = Store.open(store_path)
    out = settings.out or store_path.parent / "results.json"
    if out.suffix == ".md":
        raise SettingsError(f"--out {out}", "the JSON file's name", "end it in .json; the .md goes beside it")
    for file in (out, out.with_suffix(".md")):
        if file.exists() and not settings.force:
            raise SettingsError(f"--out {file}, which exists", "a new file", "pass --force or another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if store.num_sequences("validation") == 0:
        raise StoreError(
            f"store {store_path} without validation sequences",
            "at least one",
            "extract with --validation-tokens",
        )
    opened = [runs.open_run(path) for path in find_runs(store_path, settings.runs)]
    for run in opened:
        if store.fingerprint != run.store_fingerprint and store.origin != run.store_origin:
            raise RunError(
                f"{run.path}, trained from another store than {store_path}",
                "runs of this store",
                "name the run's store with --store, or train again",
            )
    if settings.adaptive:
        _check_adaptive(opened, settings)
    teacher = open_recorded(store.identity["teacher"], settings.workspace, store.path)
    rows = _rows(opened, settings, store, teacher)
    score(
        rows,
        store,
        teacher,
        batch_tokens=settings.batch_tokens,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        timed_batches=TIMED_BATCHES,
    )
    result = {
        "teacher": teacher.name,
        "store": str(store_path),
        "store_fingerprint": store.fingerprint,
        "validation_tokens": store.num_sequences("validation") * store.context,
        "compute_dtype": settings.compute_dtype,
        "settings": to_json(settings),
        "rows": [row.plain() for row in rows if row.evaluations is None],
    }
    if settings.adaptive:
        result["adaptive"] = [row.plain() for row in rows if row.evaluations is not None]
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(out.with_suffix(".md"), markdown(result).encode())
    return result | {"out": str(out)}


def _check_adaptive(opened: list[runs.Run], settings: EvaluateSettings) -> None:
    if max(settings.k) < 2:
        raise SettingsError(
            f"--adaptive with --k {max(settings.k)}", "a largest k of at least 2", "pass --k 1,2,3"
        )
    timed = [run for run in opened if run.has_time]
    if not timed:
        raise SettingsError(
            "--adaptive without a flow", "a run with steps, as fw and sfm train", "name such a run"
        )
    for run in timed:
        if (settings.solver or run.solver) != "euler":
            raise SettingsError(
                f"--adaptive with the midpoint solver of {run.path.name}",
                "euler, whose every evaluation predicts the end",
                "pass --solver euler too",
            )


def _keep(x: States, context: AttentionContext) -> States:
    """A skipped block: its input stands in for its output."""
    del context
    return x


def _rows(opened: list[runs.Run], settings: EvaluateSettings, store: Store, teacher: Teacher) -> list[Row]:
    """Teacher, the skips of each block's first layers, each whole block skipped, then the runs."""
    total, layer = count_parameters(teacher), count_layer_parameters(teacher)
    blocks = {run.block for run in opened}
    first_layers = {
        (m, m + count) for m, _ in blocks for count in settings.skips if m + count <= teacher.num_layers
    }
    rows = [Row("teacher", None, _keep, total)]
    for m, n in sorted(first_layers | blocks):
        name = f"skip layer {m}" if n == m + 1 else f"skip layers {m}-{n - 1}"
        rows.append(Row(name, (m, n), _keep, total - (n - m) * layer, nfe=0))
    each = []
    for run in opened:
        m, n = run.block
        absent = [state for state in run.block if state not in store.layers]
        if absent:
            raise RunError(
                f"run {run.path} of block {m}:{n}", f"state {absent[0]} in the store", "extract it"
            )
        own = run_rows(
            run,
            settings.k,
            teacher,
            settings.device,
            solver=settings.solver,
            thresholds=settings.adaptive,
        )
        each.append([row for row in own if row.evaluations is None])
        rows += own
    if settings.together:
        in_order = sorted(each, key=lambda own: own[0].block or (0, 0))
        blocks = [own[0].block or (0, 0) for own in in_order]
        if len(blocks) < 2:
            raise SettingsError("--together with one run", "several, of blocks apart", "name more runs")
        check_apart(blocks, "--together with runs of blocks")
        rows += together_rows(in_order, teacher, settings.device)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    lines = [
        f"# Results: {result['teacher']}",
        "",
        f"{result['validation_tokens']:,} validation tokens, evaluated in {result['compute_dtype']}. "
        "ms/token is from the first block's input to the logits, the same stretch for every row.",
        "",
        *markdown_table(result["rows"]),
        "",
        *means_section(result["rows"]),
        *adaptive_section(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def summary(result: dict[str, Any]) -> Table:
    """The table for a terminal."""
    title = f"{result['teacher']}: {result['validation_tokens']:,} validation tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = ("method", "block", "k", "solver", "nfe", *METRICS)
    for key in shown:
        left = key in ("method", "block", "solver")
        # In a narrow terminal names are folded, never numbers.
        table.add_column(
            "w/o 1st" if key == "nmse_without_first" else COLUMNS[key],
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=key != "method",
            min_width=10 if key == "method" else 7 if key in METRICS else None,
        )
    for row in result["rows"]:
        named = row | {"method": row["run"] or row["method"]}
        table.add_row(*(cell(named[key]) for key in shown))
    for row in result.get("adaptive", []):
        named = row | {"method": f"{row['run']} below {row['threshold']:g}", "k": f"<= {row['k']}"}
        table.add_row(*(cell(named[key]) for key in shown))
    out = Path(result["out"])
    draw = "" if out.name != "results.json" else f"\nnext: lftpipe report --store {result['store']}"
    table.caption = f"written to {out} and {out.with_suffix('.md')}{draw}"
    return table
