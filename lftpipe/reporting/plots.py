"""Figures: curves of runs, steps and sweeps, the recoupling map."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lftpipe.base.outputs import MARK
from lftpipe.base.shape import Part
from lftpipe.results.plan import Plan
from lftpipe.results.recoupling import RecouplingMap, Sweep
from lftpipe.results.scores import AdaptiveScore, Score

# --- Curves of results and of training, and the scatter of a sweep, as PNG. No torch.

#: Okabe and Ito's colours, that all kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Of each line, so that twenty-eight can be told apart.
STYLES = [(colour, line) for line in ("-", "--", "-.", ":") for colour in COLOURS]


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, marked as ours."""
    figure.savefig(path, dpi=dpi, format="png", metadata={"Software": MARK.decode()})


def literal(name: str) -> str:
    """A name as matplotlib shows it literally: no mathematics, and none that a legend would hide."""
    return "\u200b" * name.startswith("_") + name.replace("$", r"\$")


def draw_steps_curve(rows: Sequence[Score], path: Path) -> None:
    """Figure 5: KL_x and NMSE against the number of steps k, one line a run.

    Runs that have no steps (regression) and skipped blocks are level lines, dotted and dashed.
    """
    runs: dict[str, list[Score]] = defaultdict(list)
    for row in rows:
        if row.run:
            runs[row.run].append(row)
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    shown = {"kl_latent": "KL_x", "nmse_without_first": "NMSE without first"}
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for (name, points), (colour, line) in zip(sorted(runs.items()), STYLES * 4, strict=False):
            known = [point for point in points if getattr(point, key) is not None]
            x, y = [point.k for point in known], [getattr(point, key) for point in known]
            if len(points) == 1 and known:
                axis.axhline(y[0], color=colour, linestyle=":", label=literal(name))
            else:
                axis.plot(x, y, marker="o", color=colour, linestyle=line, label=literal(name))
        blocks = {row.block for row in rows if row.run}
        for row in rows:
            if row.run is None and row.block in blocks and getattr(row, key) is not None:
                axis.axhline(getattr(row, key), color="0.6", linestyle="--", label=literal(row.method))
        axis.set(xlabel="steps k", ylabel=label, yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    save(figure, path)


def draw_adaptive(rows: Sequence[Score], adaptive: Sequence[AdaptiveScore], path: Path) -> None:
    """KL against mean NFE: one line a run for fixed steps, a dashed one for steps chosen token by token."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(sorted({row.run or "" for row in adaptive}), COLOURS * 4, strict=False):
        for source, style, label in ((rows, "o-", name), (adaptive, "s--", f"{name}, chosen")):
            points = sorted(
                (row.nfe or 0, row.kl) for row in source if row.run == name and row.kl is not None
            )
            x, y = [point[0] for point in points], [point[1] for point in points]
            axis.plot(x, y, style, color=colour, label=literal(label))
    axis.set(xlabel="mean NFE of a token", ylabel="KL, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def draw_training(curves: dict[str, list[dict[str, Any]]], skips: Sequence[Score], path: Path) -> None:
    """Figure 4: NMSE against training tokens, one line a run, skipped layers as dotted lines.

    `curves`: lines of metrics by run. Where a run was evaluated on validation, those points are drawn, else
    its training batches.
    `skips`: of layers that are left out.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    evaluated = {name for name, rows in curves.items() if any("validation_nmse" in row for row in rows)}
    for (name, rows), (colour, line) in zip(sorted(curves.items()), STYLES * 4, strict=False):
        key = "validation_nmse" if name in evaluated else "nmse"
        shown = [row for row in rows if key in row]
        if not shown:  # a healed run's lines have no NMSE: healing changes what comes after the block too
            continue
        marker = "o" if len(shown) < 10 else ""
        axis.plot(
            [row["tokens"] for row in shown],
            [row[key] for row in shown],
            color=colour,
            linestyle=line,
            marker=marker,
            label=literal(name) + (" (training batches)" if evaluated and name not in evaluated else ""),
        )
    levels = sorted((skip.nmse, skip.method) for skip in skips if skip.nmse is not None)
    for number, (nmse, method) in enumerate(levels):
        axis.axhline(nmse, color="0.5", linestyle=":")
        axis.annotate(
            literal(method),
            # In turn left and right: neighbours would cover each other.
            (0.01 if number % 2 else 0.99, nmse),
            xycoords=("axes fraction", "data"),
            ha="left" if number % 2 else "right",
            va="bottom",
            fontsize=7,
        )
    axis.set(
        xlabel="training tokens",
        ylabel="NMSE on validation" if evaluated else "NMSE on training batches",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    save(figure, path)


#: Predictors of a sweep and what their axes say.
PREDICTOR_LABELS = {
    "ratio": "recoupling ratio R",
    "relative_gap": "relative gap",
    "relative_displacement": "relative displacement",
    "probe_residual": "linear probe's residual",
    "influence": "influence: 1 - mean cosine",
}


def draw_sweep(result: Sweep, path: Path) -> None:
    """The KL that every block of a sweep reached against each predictor; one colour and marker a length."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    found = {
        entry.predictor: entry
        for entry in result.correlations
        if entry.against == "kl" and entry.length is None
    }
    for axis, (key, label) in zip(axes.flat, PREDICTOR_LABELS.items(), strict=False):
        for length, colour, marker in zip(result.lengths, COLOURS * 4, "osD^vP*" * 4, strict=False):
            rows = [row for row in result.rows if row.length == length and getattr(row, key) is not None]
            x, y = [getattr(row, key) for row in rows], [row.kl for row in rows]
            axis.scatter(x, y, c=colour, marker=marker, label=f"{length} layers")
            for row in rows:
                at = (getattr(row, key), row.kl)
                axis.annotate(row.block, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
        coefficient = found[key].spearman if key in found else None
        shown = "no rank correlation" if coefficient is None else f"Spearman {coefficient:+.2f}"
        axis.set(xlabel=label, yscale="log", title=f"{shown} over all blocks")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("KL reached, nats a token")
    for axis in axes.flat[len(PREDICTOR_LABELS) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_plan(result: Plan, path: Path) -> None:
    """The front of all budgets, the shapes that were scored whole, and what each layer's candidates lose."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    front, choice = [each for each in result.front if each.predicted > 0], result.choice
    left.plot(
        [each.size for each in front],
        [each.predicted for each in front],
        "o-",
        c=COLOURS[0],
        label="sum of scores",
    )
    for each in result.tried:
        left.plot(each.size, each.score, "x", c=COLOURS[3])
    left.plot(choice.size, choice.score, "*", c=COLOURS[1], markersize=14, label="chosen, scored whole")
    left.set(xlabel="parameters over the teacher's", ylabel="KL, nats a token", yscale="log")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    single = {
        (each.part.start, _kind(each.part)): each.score for each in result.candidates if _single(each.part)
    }
    kinds = sorted({kind for _, kind in single})
    scores = np.array(
        [[single.get((layer, kind), np.nan) for layer in range(result.num_layers)] for kind in kinds]
    )
    image = right.imshow(np.log10(np.maximum(scores, 1e-6)), cmap=COLOUR_MAP, aspect="auto")
    right.set_yticks(range(len(kinds)), kinds)
    right.set(xlabel="layer", title=f"{literal(result.teacher)}: KL with one layer replaced")
    figure.colorbar(image, ax=right, label="log10 of KL")
    save(figure, path)


def _single(part: Part) -> bool:
    return part.stop - part.start == 1


def _kind(part: Part) -> str:
    return "none" if part.kind == "skip" else f"width {part.width:g}"


# --- Figure 6 as PNG: the recoupling map (a), and the transport between chosen pairs of states (b, c).

#: Perceptually uniform and made for all kinds of colour vision.
COLOUR_MAP = "cividis"

#: Okabe and Ito's blue and vermilion.
MATCHED, RECOUPLED = "#0072B2", "#D55E00"

#: Inches of one cell of the map, large enough for two digits in 7 point.
CELL = 0.3


def draw_recoupling(recoupling: RecouplingMap, shown: list[tuple[int, int]], path: Path) -> None:
    """Draw the map and, beside it, the first batch's transport for the pairs `shown`."""
    side = max(CELL * len(recoupling.layers), 4.2)
    columns = -(-len(shown) // 2)
    small = max(side / 2 - 0.25, 2.4)
    figure = Figure(
        figsize=(side + 1.9 + columns * (small + 0.9), side + 1.3), layout=ConstrainedLayoutEngine(h_pad=0.12)
    )
    grid = figure.add_gridspec(2, 1 + columns, width_ratios=[side + 1.2, *[small] * columns])
    _draw_map(figure, figure.add_subplot(grid[:, 0]), recoupling)
    for number, pair in enumerate(shown):
        _draw_transport(figure.add_subplot(grid[number % 2, 1 + number // 2]), recoupling, pair)
    if shown:
        # Outside the axes, whose every corner may hold tokens.
        marks = figure.axes[-1].get_legend_handles_labels()
        figure.legend(*marks, loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    save(figure, path)


def _draw_map(figure: Figure, axis: Axes, recoupling: RecouplingMap) -> None:
    layers = recoupling.layers
    ratio = np.array(recoupling.ratio, np.float64)  # None becomes NaN
    image = axis.imshow(ratio, cmap=COLOUR_MAP, vmin=0, vmax=1)
    for m, n in zip(*np.nonzero(~np.isnan(ratio)), strict=True):
        light = ratio[m, n] > 0.55
        axis.text(
            n,
            m,
            _short(float(ratio[m, n])),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if light else "white",
        )
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axis.set(xlabel="state n, after the block", ylabel="state m, before the block")
    axis.spines[["left", "bottom", "top", "right"]].set_visible(False)
    axis.set_title(_title(recoupling), fontsize=10)
    figure.colorbar(image, ax=axis, label="recoupling ratio R", shrink=0.7, pad=0.02, aspect=30)


def _draw_transport(axis: Axes, recoupling: RecouplingMap, pair: tuple[int, int]) -> None:
    m, n = (recoupling.layers.index(layer) for layer in pair)
    partner = np.array(recoupling.partners[m][n])
    source = np.arange(len(partner))
    size = np.clip(1500 / len(partner), 0.5, 16)
    for chosen, colour, marker, name in (
        (partner == source, MATCHED, "o", "own partner"),
        (partner != source, RECOUPLED, "x", "another"),
    ):
        axis.scatter(
            partner[chosen], source[chosen], s=size, c=colour, marker=marker, linewidths=0.8, label=name
        )
    axis.set(xlim=(-1, len(partner)), ylim=(len(partner), -1), aspect="equal")
    axis.set(xlabel=f"token in state {pair[1]}", ylabel=f"token in state {pair[0]}")
    ratio, raw = recoupling.ratio[m][n], recoupling.ratio_raw[m][n]
    axis.set_title(f"{pair[0]}:{pair[1]}   R = {ratio:.3f} (raw {raw:.3f})", fontsize=10)


def _short(ratio: float) -> str:
    """0.53 as .53, to fit its cell; what rounds to 0 or 1 as one digit."""
    text = f"{ratio:.2f}"
    return {"0.00": "0", "1.00": "1"}.get(text, text[1:])


def _title(recoupling: RecouplingMap) -> str:
    used = recoupling.settings
    extras = [
        name for name, on in (("standardised", used["standardise"]), ("no first", used["skip_first"])) if on
    ]
    if recoupling.approximate:
        extras.append("APPROXIMATE")
    parts = [
        literal(recoupling.teacher or ""),
        f"{used['batches']} x {used['tokens']} tokens",
        used["metric"],
        *extras,
    ]
    return ", ".join(part for part in parts if part)
