"""`lftpipe recouple`: the recoupling ratio of all pairs of stored states, and the blocks that it suggests."""

import time

from lftpipe.base.errors import SettingsError
from lftpipe.base.outputs import making
from lftpipe.base.workspace import find_store, next_command, require_json_name
from lftpipe.config.layers import parse_block
from lftpipe.config.settings import RecoupleSettings
from lftpipe.recoupling import ranking
from lftpipe.recoupling.stored_map import FILE_NAME, MARKS, make_map, map_layers
from lftpipe.reporting.pages import recoupling_page
from lftpipe.reporting.plots import draw_recoupling
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Recoupling
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.store import Store

#: Fractions of the layers for which the summary recommends blocks.
FRACTIONS = (0.125, 0.25, 0.375, 0.5)


def recouple(settings: RecoupleSettings) -> Recoupling:
    """Map all pairs `m < n` of a store's states, write the map as JSON, PNG and an HTML page.

    Raises `LftpipeError` if the store lacks what is asked of it, or the file exists and `force` is not set.

    Returns
    -------
    Recoupling
        The map (docs/recoupling.md describes it), and where it was written.
    """
    started = time.monotonic()
    path = find_store(settings.workspace, settings.store)
    out = settings.out or path.parent / FILE_NAME
    require_json_name(out)
    picture, page = out.with_suffix(".png"), out.with_suffix(".html")
    with making(out, [picture, page], marks=MARKS, force=settings.force) as staging:
        store = Store.open(path)
        store.need_whole("recouple")
        layers = map_layers(settings, store)
        shown = _shown(settings, layers, store.layers)
        result = make_map(settings, store, layers)
        draw_recoupling(result, shown or _default_shown(result), staging.path(picture))
        staging.path(page).write_text(recoupling_page(result), encoding="utf-8")
        result.write(staging.path(out))
    return Recoupling(
        map=result,
        store=str(path),
        out=str(out),
        pictures=[str(picture), str(page)],
        seconds=round(time.monotonic() - started, 3),
    )


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


def _default_shown(result: RecouplingMap) -> list[tuple[int, int]]:
    """Figure 6 (b, c) shows the first block and a good one: here the first and the best quarter."""
    layers, length = result.layers, ranking.block_length(result.num_layers, 0.25)
    ranked = ranking.rank_blocks(result, length) or [(layers[0], layers[-1])]
    first = min(ranked)
    best = ranked[0]
    return [first] if best == first else [first, best]


def summary(result: Recoupling) -> FittedTable:
    """The best blocks for common fractions of the layers, and where the map is."""
    recoupling, rows = result.map, []
    lengths = {entry.length: entry.blocks for entry in recoupling.ranking}
    wanted = {ranking.block_length(recoupling.num_layers, fraction) for fraction in FRACTIONS}
    for length in sorted(wanted & lengths.keys()) or sorted(lengths)[:4]:
        (m, n), *others = lengths[length]
        figures = {
            name: ranking.value(recoupling, name, (m, n))
            for name in ("ratio", "ratio_stderr", "ratio_raw", "relative_gap", "relative_displacement")
        }
        error = "" if figures["ratio_stderr"] is None else f" ± {figures['ratio_stderr']:.3f}"
        rows.append(
            [
                f"{length / recoupling.num_layers:.0%}",
                f"{m}:{n}",
                f"{figures['ratio']:.3f}{error}",
                f"{figures['ratio_raw']:.3f}",
                f"{figures['relative_gap']:.4f}",
                f"{figures['relative_displacement']:.3f}",
                ", ".join(f"{other[0]}:{other[1]}" for other in others[:3]),
            ]
        )
    size, used = len(recoupling.layers), recoupling.settings
    kind = "APPROXIMATE (Sinkhorn, blurred) " if recoupling.approximate else ""
    head = (
        f"{kind}recoupling ratio R, {size * (size - 1) // 2} pairs of states of {recoupling.teacher}: "
        f"{used['batches']} batches of {used['tokens']} tokens, {used['metric']}"
        + (", standardised" if used["standardise"] else "")
        + (", without first positions" if used["skip_first"] else "")
        + (f"; ranked by {used['rank_by']}" if used["rank_by"] != "ratio" else "")
    )
    tail = f"{result.out} and {', '.join(result.pictures)}, {result.seconds:.1f} s\n" + next_command(
        "train", "--from-cache", "--store", result.store
    )
    names = ("replace", "block", "R", "raw", "gap", "displacement", "next best")
    columns = [
        Column(
            name,
            "left" if name in ("block", "next best") else "right",
            folds=name == "next best",
            needed=name in ("replace", "block", "R"),
        )
        for name in names
    ]
    return FittedTable(columns, rows, title=head, caption=tail)
