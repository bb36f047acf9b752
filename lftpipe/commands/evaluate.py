"""`lftpipe evaluate`: Table 1 and the curve of figure 5, from the cached validation states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.base.device import prepare, resolve_compute_dtype
from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.base.outputs import COMMENT, making
from lftpipe.base.workspace import find_runs, find_store, require_json_name
from lftpipe.config.layers import check_apart
from lftpipe.config.settings import EvaluateSettings, recorded
from lftpipe.data.teacher_reader import states_at_hand
from lftpipe.evaluation.predictors import (
    Predictor,
    joined_predictors,
    run_predictors,
    skip_predictor,
    teacher_predictor,
)
from lftpipe.evaluation.scoring import score
from lftpipe.reporting.tables import COLUMNS, cell, results_page
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Evaluation
from lftpipe.results.scores import JOINED, AdaptiveScore, Results, Score
from lftpipe.store import Store
from lftpipe.student.assemble import build_student
from lftpipe.student.loading import load_teacher
from lftpipe.teacher.source import Teacher, load_tokenizer, open_recorded, record_of

#: Batches that every row is timed on.
TIMED_BATCHES = 3

#: Tokens of a request to lm_eval, by which `--batch-tokens` becomes a number of requests.
TASK_TOKENS = 128

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


def _tasks_module() -> Any:
    """Only where tasks are asked for: it needs lm_eval, and whole models."""
    if not find_spec("lm_eval"):
        raise SettingsError(
            "--tasks without lm_eval", "the package lm_eval", "install it: pip install 'lftpipe[lm-eval]'"
        )
    from lftpipe.evaluation import tasks

    return tasks


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score teacher, skips and runs over the whole validation split, and write the table.

    Raises
    ------
    LftpipeError
        If a run is missing or of another store, or the store lacks a state.
    """
    if settings.limit is not None and settings.tasks is None:
        raise SettingsError("--limit without --tasks", "tasks whose documents it counts", "pass --tasks too")
    prepare(settings.device, settings.threads)
    store_path = find_store(settings.workspace, settings.store)
    if settings.text_field is not None and settings.corpus is None:
        raise SettingsError("--text-field without --corpus", "the corpus whose column it is", "pass --corpus")
    slug = settings.corpus and _elsewhere().slug_of(settings.corpus, settings.text_field)
    name = f"results-{slug}" if slug else "results"
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
        alone = [each for each in opened if settings.together or [each] in students]
        _check_adaptive(alone, settings)
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    in_tasks = _on_tasks(students, settings, teacher, store_path.parent / "tasks")
    corpus = settings.corpus
    scored = store if corpus is None else _elsewhere().states_elsewhere(store, corpus, settings)
    scores = score(
        _predictors(students, settings, teacher, states_at_hand(store, teacher)),
        scored,
        teacher,
        batch_tokens=settings.batch_tokens,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        timed_batches=TIMED_BATCHES,
    )
    scores = [_with_tasks(each, in_tasks) for each in scores]
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


def _on_tasks(
    students: list[list[runs.Run]], settings: EvaluateSettings, teacher: Teacher, folder: Path
) -> dict[Any, dict[str, Any]]:
    """Scores on lm_eval's tasks, as columns by run and steps, and the teacher's by None.

    A flow is scored in the steps of its training if `--k` has them, else in the most.
    """
    if settings.tasks is None:
        return {}
    of_lm_eval = _tasks_module()
    tasks, tokenizer = of_lm_eval.load_tasks(settings.tasks), load_tokenizer(teacher)
    dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
    batch = max(1, settings.batch_tokens // TASK_TOKENS)

    def score_on(label: str, identity: list[Any], load: Callable[[], Any]) -> dict[str, Any]:
        def model() -> Any:
            loaded = load().to(settings.device)
            return of_lm_eval.LanguageModel(label, loaded, tokenizer, batch=batch, dtype=dtype)

        identity = [teacher.checkpoint.digest, str(dtype), *identity]
        return of_lm_eval.score_tasks(model, identity, tasks, settings.limit, folder)

    records: dict[Any, Any] = {None: score_on("teacher", [], partial(load_teacher, teacher))}
    for student in students:
        timed = [run for run in student if run.has_time]
        most = max(settings.k) if timed else None
        steps = next((run.walk_steps for run in timed if run.walk_steps in settings.k), most)
        name, digests = JOINED.join(run.path.name for run in student), [run.weights_digest for run in student]
        build = partial(
            build_student, teacher, student, steps=steps, solver=settings.solver if timed else None
        )
        records[name, steps or 1] = score_on(name, [*digests, steps, settings.solver], build)
    columns = {key: of_lm_eval.compared(each, records[None]) for key, each in records.items()}
    return {key: {"tasks": tasks, "tasks_mean": mean} for key, (tasks, mean) in columns.items()}


def _with_tasks(row: Score, columns: dict[Any, dict[str, Any]]) -> Score:
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
    timed = [run for run in opened if run.has_time]
    if not timed:
        raise SettingsError(
            "--adaptive without a flow",
            "a run with steps, as fw and sfm train, that is a student by itself",
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
    """The runs of each student: those that were trained jointly, or all of them."""
    students = runs.open_students(paths)
    if not together:
        return students
    whole = sorted((run for student in students for run in student), key=lambda run: run.block)
    if len(whole) < 2:
        raise SettingsError(
            "--together with one run", "several runs whose blocks do not overlap", "name more runs"
        )
    runs.refuse_parts(whole)
    check_apart([run.block for run in whole], "--together with runs of blocks")
    return [whole]


def _predictors(
    students: list[list[runs.Run]], settings: EvaluateSettings, teacher: Teacher, stored: tuple[int, ...]
) -> list[Predictor]:
    """Teacher, the skips of each block's first layers, each whole block skipped, then the students."""
    blocks = {run.block for student in students for run in student}
    first_layers = {
        (m, m + count) for m, _ in blocks for count in settings.skips if m + count <= teacher.num_layers
    }
    found = [teacher_predictor(teacher)]
    found += [skip_predictor(teacher, block) for block in sorted(first_layers | blocks)]
    for student in students:
        # A layer that was healed with others is nothing without them.
        alone = len(student) == 1 or (settings.together and student[0].healed is None)
        each = [
            run_predictors(
                run,
                settings.k,
                teacher,
                settings.device,
                solver=settings.solver,
                thresholds=settings.adaptive,
                stored=stored,
                part=not alone,
            )
            for run in student
        ]
        if alone:
            found += chain.from_iterable(each)
        if len(student) > 1:
            parts = [[one for one in own if not one.adaptive] for own in each]
            found += joined_predictors(student, parts, teacher, settings.device, stored=stored)
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
