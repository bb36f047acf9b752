"""`lftpipe evaluate`: Table 1 and the curve of figure 5, from the cached validation states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.base.device import on_device, resolve_compute_dtype
from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.base.outputs import COMMENT, making
from lftpipe.base.workspace import find_runs, find_store, next_command, require_json_name
from lftpipe.config.layers import check_apart
from lftpipe.config.settings import EvaluateSettings, recorded
from lftpipe.corpus.wikitext import NAME, read_wikitext, wikitext_file
from lftpipe.evaluation.continuations import Continuing
from lftpipe.evaluation.predictors import (
    Predictor,
    joined_predictors,
    run_predictors,
    skip_predictor,
    teacher_predictor,
)
from lftpipe.evaluation.scoring import Validation, ValidationSplit, score
from lftpipe.evaluation.whole_text import WholeText
from lftpipe.reporting.tables import COLUMNS, cell, results_page
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Evaluation
from lftpipe.results.scores import JOINED, AdaptiveScore, Comparison, Results, Score
from lftpipe.store import Store
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.teacher.source import Teacher, load_tokenizer, open_recorded, record_of

#: Batches that every row is timed on.
TIMED_BATCHES = 3

METRICS = ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl", "word_ppl", "ppl_ratio", "agreement")

#: Columns that a narrow terminal shows too.
NEEDED = ("method", "k", "nmse", "kl", "ppl")

#: Headings for a terminal, where they differ from the page's.
SHORT = {"nmse_without_first": "w/o 1st", "word_ppl": "word", "ppl_ratio": "ratio", "agreement": "agree"}

#: Keys by which a table of results is known, whole or damaged.
MARKS = (b'"kl_latent"', b'"validation_tokens"', b'"ms_per_token"')


def _elsewhere() -> Any:
    """Only here, since it runs the teacher: scores from the cache load no trunk."""
    from lftpipe.extraction import compute

    return compute


def _tasks_module() -> Any:
    """Only where tasks are asked for: it needs lm_eval, and whole models."""
    if not find_spec("lm_eval"):
        raise SettingsError(
            "--tasks without lm_eval", "the package lm_eval", "install it: pip install 'lftpipe[lm-eval]'"
        )
    from lftpipe.evaluation import tasks

    return tasks


@on_device
def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score teacher, skips and runs over the whole validation split, and write the table.

    Raises `LftpipeError` if a run is missing or of another store, or the store lacks a state.
    """
    if settings.limit is not None and settings.tasks is None:
        raise SettingsError("--limit without --tasks", "tasks whose documents it counts", "pass --tasks too")
    store_path = find_store(settings.workspace, settings.store)
    if settings.text_field is not None and settings.corpus is None:
        raise SettingsError("--text-field without --corpus", "the corpus whose column it is", "pass --corpus")
    name = "results"
    if settings.corpus is not None:
        whole = wikitext_file(settings.corpus) is not None
        name += f"-{NAME if whole else _elsewhere().slug_of(settings.corpus, settings.text_field)}"
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
    students = _students(find_runs(store_path, settings.runs), together=settings.together)
    opened = [run for student in students for run in student]
    for run in opened:
        _check_run(run, store)
    if settings.adaptive:
        _check_adaptive(opened, settings)
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    columns, on_tasks = _of_whole_models(students, settings, teacher, store)
    validation = _validation(store, teacher, settings)
    scored = score(
        _predictors(students, settings, teacher, validation.states),
        validation,
        teacher,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        timed_batches=TIMED_BATCHES,
    )
    scores = [_with_columns(each, columns) for each in scored.rows]
    adaptive = [each for each in scores if isinstance(each, AdaptiveScore)]
    return Results(
        teacher=teacher.name,
        store=str(store_path),
        store_fingerprint=store.fingerprint,
        corpus=settings.corpus,
        validation_tokens=validation.num_tokens,
        documents=scored.num_documents,
        compute_dtype=settings.compute_dtype,
        settings=recorded(settings),
        rows=[each for each in scores if not isinstance(each, AdaptiveScore)],
        adaptive=adaptive if settings.adaptive else None,
        comparisons=[*scored.comparisons(), *on_tasks] or None,
    )


def _validation(store: Store, teacher: Teacher, settings: EvaluateSettings) -> Validation:
    """The store's validation split, as much of another corpus, or WikiText-2 as a whole."""
    device, batch_tokens = settings.device, settings.batch_tokens
    if (source := wikitext_file(settings.corpus)) is not None:
        dtype = resolve_compute_dtype(settings.compute_dtype, device)
        return WholeText(read_wikitext(source), teacher, device, dtype, batch_tokens)
    if settings.corpus is not None:
        store = _elsewhere().states_elsewhere(store, settings.corpus, settings)
    return ValidationSplit(store, teacher, device, batch_tokens)


def _of_whole_models(
    students: list[list[runs.Run]], settings: EvaluateSettings, teacher: Teacher, store: Store
) -> tuple[dict[Any, dict[str, Any]], list[Comparison]]:
    """Columns of what needs whole models, by run and steps, the teacher's by None; and who is ahead on tasks.

    A flow takes the steps of its training if `--k` has them, else the most.
    """
    if settings.tasks is None and not settings.continuations:
        return {}, []
    measures: list[Any] = []
    tokenizer, folder = load_tokenizer(teacher), store.path.parent / "tasks"
    if settings.tasks is not None:
        dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
        digest = teacher.checkpoint.digest
        measures.append(_tasks_module().OnTasks(settings, tokenizer, dtype, digest, folder))
    if settings.continuations:
        measures.append(Continuing(store, tokenizer, settings.continuations))

    def measure(label: str, identity: list[Any], load: Callable[[], Any]) -> dict[str, Any]:
        model = cache(lambda: load().to(settings.device))  # loaded once, and only if one needs it
        return dict(chain.from_iterable(each.columns(label, identity, model).items() for each in measures))

    columns: dict[Any, dict[str, Any]] = {None: measure("teacher", [], partial(load_teacher, teacher))}
    for student in students:
        timed = [run for run in student if run.has_time]
        most = max(settings.k) if timed else None
        steps = next((run.walk_steps for run in timed if run.walk_steps in settings.k), most)
        name, digests = JOINED.join(run.path.name for run in student), [run.weights_digest for run in student]
        solver = settings.solver if timed else None
        build = partial(build_student, teacher, student, steps=steps, solver=solver)
        columns[name, steps or 1] = measure(name, [*digests, steps, settings.solver], build)
    return columns, [one for each in measures for one in each.comparisons()]


def _with_columns(row: Score, columns: dict[Any, dict[str, Any]]) -> Score:
    key = None if row.block is None else (row.run, row.k)
    return row if isinstance(row, AdaptiveScore) or key not in columns else replace(row, **columns[key])


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
    timed = [run for run in opened if run.has_time and len(run.parts) == 1]
    if not timed:
        raise SettingsError(
            "--adaptive without a flow",
            "a run of one flow with steps, as fw and sfm train",
            "name one",
        )
    for run in timed:
        if (settings.solver or run.solver) != "euler":
            raise SettingsError(
                f"--adaptive with the midpoint solver of {run.path.name}",
                "euler, whose every evaluation predicts the end",
                "pass --solver euler too",
            )


def _students(paths: list[Path], *, together: bool) -> list[list[runs.Run]]:
    """The runs of each student: one each, or all of them."""
    opened = runs.open_runs(paths)
    if not together:
        return [[run] for run in opened]
    whole = sorted(opened, key=lambda run: run.block)
    if len(whole) < 2:
        raise SettingsError(
            "--together with one run", "several runs whose blocks do not overlap", "name more runs"
        )
    runs.refuse_healed(whole)
    check_apart([run.block for run in whole], "--together with runs of blocks")
    return [whole]


def _predictors(
    students: list[list[runs.Run]], settings: EvaluateSettings, teacher: Teacher, stored: tuple[int, ...]
) -> list[Predictor]:
    """Teacher, the skips of each block's first layers, each whole block skipped, then the students."""
    # Of a single layer that others of its student replace too, no skip says much.
    blocks = {
        part.block
        for student in students
        for run in student
        for part in run.parts
        if len(run.parts) == 1 or part.stop - part.start > 1
    }
    first_layers = {
        (m, m + count) for m, _ in blocks for count in settings.skips if m + count <= teacher.num_layers
    }
    found = [teacher_predictor(teacher)]
    found += [skip_predictor(teacher, block) for block in sorted(first_layers | blocks)]
    for student in students:
        each = [
            run_predictors(
                run,
                settings.k,
                teacher,
                settings.device,
                solver=settings.solver,
                thresholds=settings.adaptive,
                stored=stored,
            )
            for run in student
        ]
        found += chain.from_iterable(each)
        if len(student) > 1:
            parts = [[one for one in own if not one.adaptive] for own in each]
            found += joined_predictors(student, parts, teacher, settings.device)
    return found


def markdown(result: Results) -> str:
    """The table as a Markdown page."""
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
    """The table for a terminal."""
    found = result.results
    whole = any(row.word_ppl is not None for row in found.rows)
    measures = [key for key in METRICS if whole or key != "word_ppl"]
    shown = ("method", "block", "k", "solver", "nfe", *measures)
    rows = [row.to_json() | {"method": row.run or row.method} for row in found.rows]
    rows += [
        row.to_json() | {"method": f"{row.run} below {row.threshold:g}", "k": f"<= {row.k}"}
        for row in found.adaptive or []
    ]
    page = result.out.removesuffix(".json") + ".md"  # a text: a path would fold a URL's slashes
    draw = "" if Path(page).name != "results.md" else "\n" + next_command("report", "--store", found.store)
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
        [[cell(row.get(key)) for key in shown] for row in rows],
        title=f"{found.teacher}: {found.validation_tokens:,} validation tokens{_of_corpus(found.corpus)}",
        caption=f"written to {result.out} and {page}{draw}",
        complete=f"{Path(page).name} has them",
    )
