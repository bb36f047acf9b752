"""`lftpipe sweep`: a short run for every block of some lengths, to see whether the map predicts."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.base.outputs import making
from lftpipe.base.version import __version__
from lftpipe.base.workspace import find_store, require_json_name
from lftpipe.config.settings import RecoupleSettings, SweepSettings, TrainSettings, recorded
from lftpipe.evaluation.predictors import run_predictors
from lftpipe.evaluation.scoring import ValidationSplit, score
from lftpipe.recoupling import ranking
from lftpipe.recoupling.probe import draw_parts, probe_residual
from lftpipe.recoupling.stored_map import open_map
from lftpipe.reporting import correlation
from lftpipe.reporting.correlation import OUTCOMES, choices, correlation_table, correlations, markdown
from lftpipe.reporting.plots import draw_sweep
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Sweeping
from lftpipe.results.recoupling import Matrix, RecouplingMap, Sweep, SweptBlock, SweptRun
from lftpipe.results.scores import Score
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of
from lftpipe.training.checkpoint import changed_settings
from lftpipe.training.several import train_apart
from lftpipe.training.validate import Wanted, resolved, run_name

#: Keys by which a sweep is known, whole or damaged.
MARKS = (b'"correlations"', b'"map_settings"', b'"choices"')

#: Fractions of the layers that are swept where no lengths are given.
FRACTIONS = (0.25, 0.5)

#: Tokens scored at a time.
SCORE_TOKENS = 2048


@on_device
def sweep(settings: SweepSettings) -> Sweeping:
    """Train every block of some lengths alike, score them, and correlate the map's figures with the scores.

    Finished runs are not trained again, unfinished ones go on; `force` writes over the results, and over
    runs that were begun with other settings.

    `settings`: which lengths, how long each run, and where the results go.
    Raises `LftpipeError` if lengths or store do not allow it, or the results exist and `force` is not set.

    Returns
    -------
    Sweeping
        What the blocks reached (docs/recoupling.md describes it), and how many runs were trained now.
    """
    store_path = find_store(settings.workspace, settings.store)
    out = settings.out or store_path.parent / "sweep.json"
    require_json_name(out)
    picture, page = out.with_suffix(".png"), out.with_suffix(".md")
    cure = "pass --force (finished runs are not trained again)"
    with making(out, [page, picture], marks=MARKS, force=settings.force, cure=cure) as staging:
        trained, result = _swept(settings, store_path, out.with_suffix(""))
        draw_sweep(result, staging.path(picture))
        staging.path(page).write_text(markdown(result), encoding="utf-8")
        result.write(staging.path(out))
    return Sweeping(sweep=result, out=str(out), trained=trained)


def _swept(settings: SweepSettings, store_path: Path, folder: Path) -> tuple[int, Sweep]:
    """How many runs were trained now, into `folder`, and what all of them say."""
    if settings.objective == "replaceme":
        raise SettingsError(
            "sweep --objective replaceme", "what stands for the block alone", "use --objective linear"
        )
    store = Store.open(store_path)
    store.need_whole("sweep")
    if store.num_sequences("validation") == 0:
        raise StoreError(
            f"store {store_path} without validation sequences",
            "at least one",
            "extract with --validation-tokens",
        )
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    lengths = _lengths(settings.lengths, teacher.num_layers)
    made_with = RecoupleSettings(workspace=settings.workspace, store=store_path, threads=settings.threads)
    found = open_map(store_path, store, made_with)
    swept = _blocks(found, lengths)
    found = replace(found, probe_residual=_residuals(settings, store, found, swept))
    trained, finished = _train(settings, store, teacher, swept, folder)
    rows = _rows(found, swept, _score(finished, settings, store, teacher))
    return trained, Sweep(
        teacher=teacher.name,
        store_fingerprint=store.fingerprint,
        lengths=lengths,
        validation_tokens=store.num_sequences("validation") * store.context,
        map_settings=dict(found.settings),
        settings=recorded(settings),
        lftpipe=__version__,
        rows=rows,
        correlations=correlations(rows, lengths, settings.seed),
        choices=choices(found, rows, lengths),
    )


def _lengths(given: tuple[int, ...], num_layers: int) -> list[int]:
    lengths = sorted(set(given or (ranking.block_length(num_layers, fraction) for fraction in FRACTIONS)))
    if lengths[-1] > num_layers:
        raise SettingsError(
            f"--lengths {','.join(map(str, lengths))}",
            f"at most {num_layers}, the teacher's layers",
            "name smaller lengths",
        )
    return lengths


def _blocks(found: RecouplingMap, lengths: list[int]) -> list[ranking.Block]:
    """All blocks of these lengths between states on the map, in order."""
    swept: list[ranking.Block] = []
    for length in lengths:
        here = sorted(ranking.rank_blocks(found, length))
        if not here:
            raise SettingsError(
                f"--lengths {length}",
                f"two states that far apart on the map of states {', '.join(map(str, found.layers))}",
                "name other lengths, or extract and recouple more layers",
            )
        swept += here
    if len(swept) < correlation.FEWEST:
        raise SettingsError(
            f"--lengths {','.join(map(str, lengths))}, of which there are {len(swept)} blocks",
            f"at least {correlation.FEWEST} blocks to compare",
            "name smaller lengths, or more of them",
        )
    return swept


def _residuals(
    settings: SweepSettings, store: Store, found: RecouplingMap, swept: list[ranking.Block]
) -> Matrix:
    """The linear probe's residual of the swept blocks, as a square like those of the map."""
    layers = found.layers
    residuals: Matrix = [[None] * len(layers) for _ in layers]
    parts = draw_parts(store, settings.probe_tokens, settings.seed)
    with progress.task(f"linear probe of {len(swept)} blocks", len(swept), "blocks") as task:
        for m, n in swept:
            residuals[layers.index(m)][layers.index(n)] = probe_residual(store, (m, n), *parts)
            task.advance(1)
    return residuals


def _train(
    settings: SweepSettings, store: Store, teacher: Teacher, swept: list[ranking.Block], folder: Path
) -> tuple[int, list[runs.Run]]:
    """How many runs were trained now, and all of them, finished."""
    wanted: list[Wanted] = []
    for block in swept:
        for seed in range(settings.seed, settings.seed + settings.repeats):
            one = TrainSettings(
                workspace=settings.workspace,
                store=store.path,
                seed=seed,
                device=settings.device,
                objective=settings.objective,
                tokens=settings.tokens,
                batch_tokens=settings.batch_tokens,
                optimizer=settings.optimizer,
                learning_rate=settings.learning_rate,
                compute_dtype=settings.compute_dtype,
                resume=True,
            )
            one = resolved(one, store, [block], teacher)
            run = folder / run_name(one, [block])
            wanted.append((run, _agreed(run, one, store, settings.force), [block]))
    with progress.task(f"sweep {teacher.name}", len(wanted), "runs") as task:
        results = train_apart(
            [[each] for each in wanted],
            store,
            teacher,
            workers=settings.workers,
            advance=task.advance,
        )
    trained = sum(not result.already_finished for result in results)
    return trained, [runs.open_run(run) for run, _, _ in wanted]


def _agreed(run: Path, wanted: TrainSettings, store: Store, force: bool) -> TrainSettings:
    """The settings, if the run was not begun with others; with `force`, they then start it anew."""
    if not (run / runs.SETTINGS).exists():
        return wanted
    try:
        for key, before, now in changed_settings(run, wanted, store):
            raise RunError(
                f"{key} = {now} for {run}",
                f"{key} = {before}, as it was begun",
                "use the same settings, another --out, or --force to train it again",
            )
    except RunError:
        if not force:
            raise
        return replace(wanted, force=True)
    return wanted


def _score(finished: list[runs.Run], settings: SweepSettings, store: Store, teacher: Teacher) -> list[Score]:
    """Every run's line of Table 1, with as many steps as it was trained with, untimed."""
    predictors = [
        one for run in finished for one in run_predictors(run, (run.walk_steps,), teacher, settings.device)
    ]
    return score(
        predictors,
        ValidationSplit(store, teacher, settings.device, SCORE_TOKENS),
        teacher,
        compute_dtype="float32",
        device=settings.device,
    ).rows


def _rows(found: RecouplingMap, swept: list[ranking.Block], scored: list[Score]) -> list[SweptBlock]:
    """Of every block the predictors, and what its runs reached, in the mean and each."""
    kept = [field.name for field in fields(SweptRun)]
    rows = []
    for m, n in swept:
        mine = [row for row in scored if row.block == f"{m}:{n}"]
        for row in mine:
            if None in (row.kl, row.nmse, row.nmse_without_first, row.ppl):
                raise RunError(
                    f"run {row.run}, whose predictions are not finite",
                    "finite ones",
                    "sweep with a lower --learning-rate into another --out",
                )
        predictors = {key: ranking.value(found, key, (m, n)) for key in ranking.PREDICTORS.values()}
        reached = {key: float(np.mean([getattr(row, key) for row in mine])) for key in OUTCOMES}
        each = [SweptRun(**{key: getattr(row, key) for key in kept}) for row in mine]
        rows.append(SweptBlock(block=f"{m}:{n}", length=n - m, **predictors, **reached, runs=each))
    return rows


def summary(result: Sweeping) -> FittedTable:
    """The correlations with KL for a terminal."""
    heading, rows = correlation_table(result.sweep, "kl")
    out = Path(result.out)
    return FittedTable(
        [Column(name, "left", needed=index < 2) for index, name in enumerate(heading)],
        rows,
        title=f"{result.sweep.teacher}: Spearman's coefficient with the KL reached, "
        f"{len(result.sweep.rows)} blocks",
        caption=f"{result.trained} runs trained; {out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}",
        complete=f"{out.with_suffix('.md').name} has them",
    )
