"""`lftpipe recouple`: the recoupling ratio of all pairs of stored states, and the blocks that it suggests."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

import lftpipe
from lftpipe import blocks
from lftpipe.assignment import solver
from lftpipe.errors import SettingsError
from lftpipe.heatmap import draw_recoupling
from lftpipe.heatmap_page import recoupling_page
from lftpipe.manifest import write_atomic
from lftpipe.pairs import solve_pairs, statistics
from lftpipe.samples import draw_samples
from lftpipe.settings import RecoupleSettings, TrainSettings, to_plain
from lftpipe.spans import parse_block, parse_layers
from lftpipe.store import Store
from lftpipe.workspace import check_outputs, find_store

FILE_NAME = "recoupling.json"

#: Largest exact problem: at 4096 tokens each thread needs 420 MB and about a second a pair.
MOST_EXACT_TOKENS = 4096

#: Shares of the layers for which the summary recommends blocks.
SHARES = (0.125, 0.25, 0.375, 0.5)


def recouple(settings: RecoupleSettings) -> dict[str, Any]:
    """Map all pairs `m < n` of a store's states, write the map as JSON, PNG and an HTML page.

    Returns
    -------
    dict
        The content of the JSON file (docs/recoupling.md describes it), and `out`, `pictures`, `seconds`.

    Raises
    ------
    LftpipeError
        If the store lacks what is asked of it, or the file exists and `force` is not set.
    """
    started = time.monotonic()
    path = find_store(settings.workspace, settings.store)
    out = settings.out or path.parent / FILE_NAME
    check_outputs(out, (".png", ".html"), settings.force)
    pictures = [out.with_suffix(".png"), out.with_suffix(".html")]
    store = Store.open(path)
    layers = _layers(settings, store)
    if settings.tokens < 2:
        raise SettingsError(f"--tokens {settings.tokens}", "at least 2, that could be recoupled", "raise it")
    if settings.tokens > MOST_EXACT_TOKENS and not settings.approximate:
        raise SettingsError(
            f"--tokens {settings.tokens}",
            f"at most {MOST_EXACT_TOKENS} with exact transport",
            "lower it, or pass --approximate",
        )
    shown = _shown(settings, layers, store.layers)
    samples = draw_samples(
        store,
        tokens=settings.tokens,
        batches=settings.batches,
        sequences=settings.sequences,
        seed=settings.seed,
        skip_first=settings.skip_first,
    )
    figures, partners = solve_pairs(settings, store, layers, samples)
    teacher = store.identity.get("teacher", {})
    num_layers = teacher.get("layers", max(store.layers))
    result: dict[str, Any] = {
        "layers": list(layers),
        **statistics(figures),
        "partners": partners,
        "samples": samples.tolist(),
        "teacher": teacher.get("name", path.parent.name),
        "num_layers": num_layers,
        "approximate": settings.approximate,
        "solver": "POT sinkhorn_log" if settings.approximate else solver(),
        "lftpipe": lftpipe.__version__,
        "settings": to_plain(settings),
        "store_fingerprint": store.fingerprint,
    }
    if settings.rank_by == "probe":
        result["probe_residual"] = _residuals(store, layers, settings)
    result["ranking"] = blocks.ranking(result, num_layers, settings.rank_by)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_recoupling(result, shown or _default_shown(result), pictures[0])
    write_atomic(pictures[1], recoupling_page(result).encode())
    write_atomic(out, _text(result).encode())
    return result | {
        "store": str(path),
        "out": str(out),
        "pictures": [str(picture) for picture in pictures],
        "seconds": round(time.monotonic() - started, 3),
    }


def open_map(store_path: Path, store: Store, made_with: RecoupleSettings) -> dict[str, Any]:
    """The map beside a store, made with these settings if there is none.

    Raises
    ------
    SettingsError
        If it was made from another store.
    """
    path = store_path.parent / FILE_NAME
    if not path.exists():
        recouple(replace(made_with, force=True))  # pictures without it are of no use
    found = json.loads(path.read_text())
    if found["store_fingerprint"] != store.fingerprint:
        raise SettingsError(
            f"{path}, made from another or an older store than {store_path}",
            f"a map of the store {store.fingerprint}",
            "run `lftpipe recouple --force`",
        )
    return found


def choose_block(store_path: Path, settings: TrainSettings) -> tuple[int, int]:
    """The block of `train --block auto`, from the map beside the store, which is made if there is none.

    Raises
    ------
    SettingsError
        If the map was made from another store, or has no block of that length.
    """
    store = Store.open(store_path)
    made_with = RecoupleSettings(
        workspace=settings.workspace, store=store_path, threads=settings.threads, rank_by=settings.rank_by
    )
    found = open_map(store_path, store, made_with)
    num_layers = store.identity.get("teacher", {}).get("layers", max(store.layers))
    return blocks.best_block(found, num_layers, settings.replace, settings.rank_by)


def _layers(settings: RecoupleSettings, store: Store) -> tuple[int, ...]:
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


def _shown(
    settings: RecoupleSettings, layers: tuple[int, ...], held: tuple[int, ...]
) -> list[tuple[int, int]]:
    pairs = [parse_block(text.strip(), max(held)) for text in settings.show.split(",") if text]
    for m, n in pairs:
        if m not in layers or n not in layers:
            raise SettingsError(
                f"--show {m}:{n}", f"two of the states {', '.join(map(str, layers))}", "choose among these"
            )
    return pairs


def _residuals(store: Store, layers: tuple[int, ...], settings: RecoupleSettings) -> list[list[float | None]]:
    # Only here: the map itself needs no torch.
    from lftpipe.device import prepare
    from lftpipe.probe import residual_map

    prepare(settings.device, settings.threads)
    return residual_map(store, layers, settings.seed)


def _default_shown(result: dict[str, Any]) -> list[tuple[int, int]]:
    """Figure 6 (b, c) shows the first block and a good one: here the first and the best quarter."""
    layers, length = result["layers"], blocks.block_length(result["num_layers"], 0.25)
    ranked = blocks.rank_blocks(result, length) or [(layers[0], layers[-1])]
    first = min(ranked)
    best = ranked[0]
    return [first] if best == first else [first, best]


def _text(result: dict[str, Any]) -> str:
    """JSON with one key a line: readable, and a small file."""
    lines = (f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in result.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def summary(result: dict[str, Any]) -> RenderableType:
    """The best blocks for common shares of the layers, and where the map is."""
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    for name in ("replace", "block", "R", "raw", "gap", "displacement", "next best"):
        table.add_column(name, justify="left" if name in ("block", "next best") else "right")
    lengths = {entry["length"]: entry["blocks"] for entry in result["ranking"]}
    wanted = {blocks.block_length(result["num_layers"], share) for share in SHARES}
    for length in sorted(wanted & lengths.keys()) or sorted(lengths)[:4]:
        (m, n), *others = lengths[length]
        figures = {
            name: blocks.value(result, name, (m, n))
            for name in ("ratio", "ratio_stderr", "ratio_raw", "relative_gap", "relative_displacement")
        }
        error = "" if figures["ratio_stderr"] is None else f" ± {figures['ratio_stderr']:.3f}"
        table.add_row(
            f"{length / result['num_layers']:.0%}",
            f"{m}:{n}",
            f"{figures['ratio']:.3f}{error}",
            f"{figures['ratio_raw']:.3f}",
            f"{figures['relative_gap']:.4f}",
            f"{figures['relative_displacement']:.3f}",
            ", ".join(f"{other[0]}:{other[1]}" for other in others[:3]),
        )
    size, used = len(result["layers"]), result["settings"]
    kind = "APPROXIMATE (Sinkhorn, blurred) " if result["approximate"] else ""
    head = (
        f"{kind}recoupling ratio R, {size * (size - 1) // 2} pairs of states of {result['teacher']}: "
        f"{used['batches']} batches of {used['tokens']} tokens, {used['metric']}"
        + (", standardised" if used["standardise"] else "")
        + (", without first positions" if used["skip_first"] else "")
        + (f"; ranked by {used['rank_by']}" if used["rank_by"] != "ratio" else "")
    )
    tail = (
        f"{result['out']} and {', '.join(result['pictures'])}, {result['seconds']:.1f} s\n"
        f"next: lftpipe train --from-cache --store {result['store']}"
    )
    return Group(head, table, tail)
