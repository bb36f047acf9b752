"""`lftpipe evaluate`: Table 1 and the curve of figure 5, from the cached validation states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.artefacts.outcomes.pipeline import Evaluation
from lftpipe.artefacts.results import AdaptiveScore, Results
from lftpipe.config.layers import check_apart
from lftpipe.config.settings import EvaluateSettings, recorded
from lftpipe.device import prepare
from lftpipe.errors import RunError, SettingsError, StoreError
from lftpipe.evaluation.predictor import Predictor
from lftpipe.evaluation.predictors import joined_predictors, run_predictors, skip_predictor, teacher_predictor
from lftpipe.evaluation.scoring import score
from lftpipe.live import states_at_hand
from lftpipe.outputs import COMMENT, making
from lftpipe.reporting.tables import COLUMNS, cell, results_page
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.store import Store
from lftpipe.teacher.recorded import open_recorded, record_of
from lftpipe.teacher.source import Teacher
from lftpipe.workspace import find_runs, find_store, require_json_name

#: Batches that every row is timed on.
TIMED_BATCHES = 3

METRICS = ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl", "ppl_ratio", "agreement")

#: Columns that a narrow terminal shows too.
NEEDED = ("method", "k", "nmse", "kl", "ppl")

#: Headings for a terminal, where they differ from the page's.
SHORT = {"nmse_without_first": "w/o 1st", "ppl_ratio": "ratio", "agreement": "agree"}

#: Keys by which a table of results is known, whole or damaged.
MARKS = (b'"kl_latent"', b'"validation_tokens"', b'"ms_per_token"')


def _elsewhere() -> Any:
    """Only here, since it runs the teacher: scores from the cache load no trunk."""
    from lftpipe.extraction import other_corpus

    return other_corpus


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score teacher, skips and runs over the whole validation split, and write the table.

    Parameters
    ----------
    settings
        Which runs, in how many steps.

    Returns
    -------
    Evaluation
        The table, and where it was written.

    Raises
    ------
    LftpipeError
        If a run is missing or of another store, or the store lacks a state.
    """
    prepare(settings.device, settings.threads)
    store_path = find_store(settings.workspace, settings.store)
    name = "results" if settings.corpus is None else f"results-{_elsewhere().slug_of(settings.corpus)}"
    out = settings.out or store_path.parent / f"{name}.json"
    require_json_name(out)
    page = out.with_suffix(".md")
    with making(out, [page], marks=MARKS, force=settings.force) as staging:
        result = _results(settings, store_path)
        result.write(staging.path(out))
        staging.path(page).write_text(markdown(result), encoding="utf-8")
    return Evaluation(results=result, out=str(out))


def _results(settings: EvaluateSettings, store_path: Path) -> Results:
    store = Store.open(store_path)
    if store.num_sequences("validation") == 0:
        raise StoreError(
            f"store {store_path} without validation sequences",
            "at least one",
            "extract with --validation-tokens",
        )
    opened = [runs.open_run(path) for path in find_runs(store_path, settings.runs)]
    for run in opened:
        _check_run(run, store)
    if settings.adaptive:
        _check_adaptive(opened, settings)
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    corpus = settings.corpus
    scored = store if corpus is None else _elsewhere().states_elsewhere(store, corpus, settings)
    scores = score(
        _predictors(opened, settings, teacher, states_at_hand(store, teacher)),
        scored,
        teacher,
        batch_tokens=settings.batch_tokens,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        timed_batches=TIMED_BATCHES,
    )
    adaptive = [each for each in scores if isinstance(each, AdaptiveScore)]
    return Results(
        teacher=teacher.name,
        store=str(store_path),
        store_fingerprint=store.fingerprint,
        corpus=settings.corpus,
        validation_tokens=scored.num_sequences("validation") * store.context,
        compute_dtype=settings.compute_dtype,
        settings=recorded(settings),
        rows=[each for each in scores if not isinstance(each, AdaptiveScore)],
        adaptive=adaptive if settings.adaptive else None,
    )


def _check_run(run: runs.Run, store: Store) -> None:
    if store.fingerprint != run.store_fingerprint and store.origin != run.store_origin:
        raise RunError(
            f"{run.path}, trained from another store than {store.path}",
            "runs of this store",
            "name the run's store with --store, or train again",
        )
    m, n = run.block
    absent = [state for state in run.block if state not in store.layers]
    if absent and store.layers:  # a store of tokens alone is scored with the live teacher
        raise RunError(f"run {run.path} of block {m}:{n}", f"state {absent[0]} in the store", "extract it")


def _check_adaptive(opened: list[runs.Run], settings: EvaluateSettings) -> None:
    if max(settings.k) < 2:
        raise SettingsError(f"--adaptive with --k {max(settings.k)}", "a k of at least 2", "pass --k 1,2,3")
    timed = [run for run in opened if run.has_time]
    if not timed:
        raise SettingsError(
            "--adaptive without a flow", "a run with steps, as fw and sfm train", "name one that has steps"
        )
    for run in timed:
        if (settings.solver or run.solver) != "euler":
            raise SettingsError(
                f"--adaptive with the midpoint solver of {run.path.name}",
                "euler, whose every evaluation predicts the end",
                "pass --solver euler too",
            )


def _predictors(
    opened: list[runs.Run], settings: EvaluateSettings, teacher: Teacher, stored: tuple[int, ...]
) -> list[Predictor]:
    """Teacher, the skips of each block's first layers, each whole block skipped, then the runs."""
    blocks = {run.block for run in opened}
    jointly = _jointly_trained(opened)
    first_layers = {
        (m, m + count) for m, _ in blocks for count in settings.skips if m + count <= teacher.num_layers
    }
    found = [teacher_predictor(teacher)]
    found += [skip_predictor(teacher, block) for block in sorted(first_layers | blocks)]
    each: dict[Path, list[Predictor]] = {}
    for run in opened:
        own = run_predictors(
            run,
            settings.k,
            teacher,
            settings.device,
            solver=settings.solver,
            thresholds=settings.adaptive,
            stored=stored,
        )
        each[run.path] = [one for one in own if not one.adaptive]
        if settings.together or run.path not in jointly:
            found += own
    students = jointly.values() if not settings.together else [_all_together(opened)]
    for student in dict.fromkeys(students):
        found += joined_predictors([each[path] for path in student], teacher, settings.device)
    return found


def _jointly_trained(opened: list[runs.Run]) -> dict[Path, tuple[Path, ...]]:
    """Of each run that was trained jointly with others which are all there: the whole student's runs."""
    there = {run.path for run in opened}
    found: dict[Path, tuple[Path, ...]] = {}
    for run in opened:
        student = tuple(run.path.parent / name for name in run.joint or ())
        if run.path in student and there.issuperset(student):
            found[run.path] = student
    return found


def _all_together(opened: list[runs.Run]) -> tuple[Path, ...]:
    """All runs as one student's, in the order of their blocks."""
    if any(run.healed for run in opened):
        raise RunError("--together with a healed run", "runs that were not healed", "score it alone")
    if len(opened) < 2:
        raise SettingsError(
            "--together with one run", "several runs whose blocks do not overlap", "name more runs"
        )
    in_order = sorted(opened, key=lambda run: run.block)
    check_apart([run.block for run in in_order], "--together with runs of blocks")
    return tuple(run.path for run in in_order)


def markdown(result: Results) -> str:
    """The table as a Markdown page.

    Parameters
    ----------
    result
        The table.
    """
    introduction = (
        f"{result.validation_tokens:,} validation tokens{_of_corpus(result.corpus)}, evaluated in "
        f"{result.compute_dtype}. "
        "ms/token is from the first block's input to the logits, the same stretch for every row."
    )
    lines = results_page(result, f"Results: {result.teacher}", introduction)
    return "\n".join([*lines, COMMENT]) + "\n"


def _of_corpus(corpus: str | None) -> str:
    return "" if corpus is None else f" of {corpus}"


def summary(result: Evaluation) -> FittedTable:
    """The table for a terminal.

    Parameters
    ----------
    result
        What `evaluate` returned.
    """
    shown, found = ("method", "block", "k", "solver", "nfe", *METRICS), result.results
    rows = [row.to_json() | {"method": row.run or row.method} for row in found.rows]
    rows += [
        row.to_json() | {"method": f"{row.run} below {row.threshold:g}", "k": f"<= {row.k}"}
        for row in found.adaptive or []
    ]
    page = result.out.removesuffix(".json") + ".md"  # a text: a path would fold a URL's slashes
    draw = "" if Path(page).name != "results.md" else f"\nnext: lftpipe report --store {found.store}"
    return FittedTable(
        [
            Column(
                SHORT.get(key, COLUMNS[key]),
                "left" if key in ("method", "block", "solver") else "right",
                folds=key == "method",
                needed=key in NEEDED,
            )
            for key in shown
        ],
        [[cell(row[key]) for key in shown] for row in rows],
        title=f"{found.teacher}: {found.validation_tokens:,} validation tokens{_of_corpus(found.corpus)}",
        caption=f"written to {result.out} and {page}{draw}",
        complete=f"{Path(page).name} has them",
    )
