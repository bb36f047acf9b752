"""Figure 6 as PNG: the recoupling map (a), and the transport between chosen pairs of states (b, c)."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lftpipe.artefacts.recoupling import RecouplingMap
from lftpipe.reporting.plots import literal, save

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
