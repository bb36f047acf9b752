"""Curves of results and of training, and the scatter of a sweep, as PNG. No torch."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Okabe and Ito's colours, that all kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Of each line, so that twenty-eight can be told apart.
STYLES = [(colour, line) for line in ("-", "--", "-.", ":") for colour in COLOURS]


def draw_steps_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Figure 5: KL_x and NMSE against the number of steps k, one line a run.

    Runs that have no steps (regression) and skipped blocks are level, dotted lines.
    """
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["run"]:
            runs[row["run"]].append(row)
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    shown = {"kl_latent": "KL_x", "nmse_without_first": "NMSE without first"}
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for (name, points), (colour, line) in zip(sorted(runs.items()), STYLES * 4, strict=False):
            x, y = [p["k"] for p in points], [p[key] for p in points]
            if len(points) == 1:
                axis.axhline(y[0], color=colour, linestyle=":", label=name)
            else:
                axis.plot(x, y, marker="o", color=colour, linestyle=line, label=name)
        blocks = {row["block"] for row in rows if row["run"]}
        for row in rows:
            if row["run"] is None and row["block"] in blocks and row[key] is not None:
                axis.axhline(row[key], color="0.6", linestyle="--", label=f"{row['method']}")
        axis.set(xlabel="steps k", ylabel=label, yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


def draw_adaptive(rows: list[dict[str, Any]], adaptive: list[dict[str, Any]], path: Path) -> None:
    """KL against mean NFE: one line a run for fixed steps, a dashed one for steps chosen token by token."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(sorted({row["run"] for row in adaptive}), COLOURS * 4, strict=False):
        for source, style, label in ((rows, "o-", name), (adaptive, "s--", f"{name}, chosen")):
            points = sorted((row["nfe"], row["kl"]) for row in source if row["run"] == name)
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axis.set(xlabel="mean NFE of a token", ylabel="KL, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def draw_training(curves: dict[str, list[dict[str, Any]]], skips: list[dict[str, Any]], path: Path) -> None:
    """Figure 4: NMSE against training tokens, one line a run, skipped layers as dotted lines.

    Parameters
    ----------
    curves
        Lines of metrics by run. Where a run was evaluated on validation, those points are drawn, else
        its training batches.
    skips
        Rows of the table of results.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    on_validation = any("validation_nmse" in row for rows in curves.values() for row in rows)
    key = "validation_nmse" if on_validation else "nmse"
    for (name, rows), (colour, line) in zip(sorted(curves.items()), STYLES * 4, strict=False):
        shown = [row for row in rows if key in row]
        marker = "o" if len(shown) < 10 else ""
        axis.plot(
            [row["tokens"] for row in shown],
            [row[key] for row in shown],
            color=colour,
            linestyle=line,
            marker=marker,
            label=name,
        )
    for number, row in enumerate(sorted(skips, key=lambda row: row["nmse"])):
        axis.axhline(row["nmse"], color="0.5", linestyle=":")
        axis.annotate(
            row["method"],
            # In turn left and right: neighbours would cover each other.
            (0.01 if number % 2 else 0.99, row["nmse"]),
            xycoords=("axes fraction", "data"),
            ha="left" if number % 2 else "right",
            va="bottom",
            fontsize=7,
        )
    axis.set(
        xlabel="training tokens",
        ylabel="NMSE on validation" if on_validation else "NMSE on training batches",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


#: Predictors of a sweep and what their axes say.
PREDICTOR_LABELS = {
    "ratio": "recoupling ratio R",
    "relative_gap": "relative gap",
    "relative_displacement": "relative displacement",
    "probe_residual": "linear probe's residual",
}


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """The KL that every block of a sweep reached against each predictor; one colour and marker a length."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    found = {
        entry["predictor"]: entry
        for entry in result["correlations"]
        if entry["against"] == "kl" and entry["length"] is None
    }
    for axis, (key, label) in zip(axes.flat, PREDICTOR_LABELS.items(), strict=True):
        for length, colour, marker in zip(result["lengths"], COLOURS * 4, "osD^vP*" * 4, strict=False):
            rows = [row for row in result["rows"] if row["length"] == length]
            x, y = [row[key] for row in rows], [row["kl"] for row in rows]
            axis.scatter(x, y, c=colour, marker=marker, label=f"{length} layers")
            for row in rows:
                at = (row[key], row["kl"])
                axis.annotate(row["block"], at, xytext=(4, 3), textcoords="offset points", fontsize=7)
        coefficient = found[key]["spearman"]
        shown = "no rank correlation" if coefficient is None else f"Spearman {coefficient:+.2f}"
        axis.set(xlabel=label, yscale="log", title=f"{shown} over all blocks")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("KL reached, nats a token")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
