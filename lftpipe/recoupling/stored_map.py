"""The map as a file: made from a store, written, and opened again for whoever chooses a block by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lftpipe.base.errors import SettingsError
from lftpipe.base.outputs import making
from lftpipe.base.version import __version__
from lftpipe.config.layers import parse_layers
from lftpipe.config.settings import RecoupleSettings, TrainSettings, recorded
from lftpipe.recoupling import ranking
from lftpipe.recoupling.coupling import solver
from lftpipe.recoupling.map import draw_samples, solve_pairs, statistics
from lftpipe.results.recoupling import MapSettings, Matrix, RecouplingMap
from lftpipe.store import Store

FILE_NAME = "recoupling.json"

#: Keys by which a map is known, whole or damaged.
MARKS = (b'"ratio_raw"', b'"relative_displacement"', b'"identity_cost"')

#: Largest exact problem: at 4096 tokens each thread needs 420 MB and about a second a pair.
MOST_EXACT_TOKENS = 4096


def make_map(settings: RecoupleSettings, store: Store, layers: tuple[int, ...]) -> RecouplingMap:
    """The map of these layers, ranked.

    Raises `LftpipeError` if the store has too few tokens, or the settings ask for too large an exact problem.
    """
    if settings.tokens < 2:
        raise SettingsError(f"--tokens {settings.tokens}", "at least 2", "raise it")
    if settings.tokens > MOST_EXACT_TOKENS and not settings.approximate:
        raise SettingsError(
            f"--tokens {settings.tokens}",
            f"at most {MOST_EXACT_TOKENS} with exact transport",
            "lower it, or pass --approximate",
        )
    samples = draw_samples(
        store,
        tokens=settings.tokens,
        batches=settings.batches,
        sequences=settings.sequences,
        seed=settings.seed,
        skip_first=settings.skip_first,
    )
    solved = solve_pairs(settings, store, layers, samples)
    teacher = store.identity.get("teacher", {})
    num_layers = teacher.get("layers", max(store.layers))
    figures: dict[str, Any] = statistics(solved.figures)
    result = RecouplingMap(
        layers=list(layers),
        **figures,
        partners=solved.partners,
        samples=samples.tolist(),
        teacher=teacher.get("name", store.path.parent.name),
        num_layers=num_layers,
        approximate=settings.approximate,
        solver="POT sinkhorn_log" if settings.approximate else solver(),
        lftpipe=__version__,
        settings=cast(MapSettings, recorded(settings)),
        store_fingerprint=store.fingerprint,
        probe_residual=_residuals(store, layers, settings) if settings.rank_by == "probe" else None,
        ranking=[],
    )
    return replace(result, ranking=ranking.ranking(result, num_layers, settings.rank_by))


def open_map(store_path: Path, store: Store, made_with: RecoupleSettings) -> RecouplingMap:
    """The map beside a store, made with these settings if there is none.

    Raises `SettingsError` if it is damaged, or was made from another store.
    """
    path = store_path.parent / FILE_NAME
    if not path.exists():
        with making(path, marks=MARKS, force=False) as staging:
            made = make_map(made_with, store, map_layers(made_with, store))
            made.write(staging.path(path))
    found = RecouplingMap.from_json(path)
    if found.store_fingerprint != store.fingerprint:
        raise SettingsError(
            f"{path}, made from another or an older store than {store_path}",
            f"a map of the store {store.fingerprint}",
            "run `lftpipe recouple --force`",
        )
    return found


def choose_block(store_path: Path, settings: TrainSettings) -> tuple[int, int]:
    """The block of `train --block auto`, from the map beside the store, which is made if there is none.

    Raises `SettingsError` if the map was made from another store, or has no block of that length.
    """
    store = Store.open(store_path)
    if store.spec.rolling:
        raise SettingsError(
            f"--block auto on the rolling store {store_path}",
            "a block: the map needs all of the training states",
            "give --block M:N, which `lftpipe recouple` finds on a whole store of fewer --tokens",
        )
    made_with = RecoupleSettings(
        workspace=settings.workspace, store=store_path, threads=settings.threads, rank_by=settings.rank_by
    )
    found = open_map(store_path, store, made_with)
    num_layers = store.identity.get("teacher", {}).get("layers", max(store.layers))
    return ranking.best_block(found, num_layers, settings.replace, settings.rank_by)


def map_layers(settings: RecoupleSettings, store: Store) -> tuple[int, ...]:
    """The states to compare, ascending.

    Raises `SettingsError` if the store lacks one of them, or there is only one.
    """
    if not store.layers:
        raise SettingsError(
            f"{store.path}, which holds tokens alone",
            "a store with states",
            "extract without --tokens-only into another --store, or name the block: --block M:N",
        )
    held = sorted(store.layers)
    layers = tuple(held) if settings.layers == "all" else parse_layers(settings.layers, max(held) + 1)
    absent = sorted(set(layers) - set(held))
    if absent:
        raise SettingsError(
            f"--layers {settings.layers}, of which {store.path} lacks {', '.join(map(str, absent))}",
            f"states among {', '.join(map(str, held))}",
            "choose among these, or extract more layers",
        )
    if len(layers) < 2:
        raise SettingsError(
            f"one state, {', '.join(map(str, layers))}",
            "at least two states to compare",
            "pass --layers all, or extract more layers",
        )
    return layers


def _residuals(store: Store, layers: tuple[int, ...], settings: RecoupleSettings) -> Matrix:
    # Only here: the map itself needs no torch.
    from lftpipe.base.device import own_gpu, prepared
    from lftpipe.recoupling.probe import residual_map

    with prepared(own_gpu(settings.device), settings.threads):
        return residual_map(store, layers, settings.seed)
