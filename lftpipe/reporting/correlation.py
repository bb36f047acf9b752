"""Whether the map predicts what short runs reach: Spearman's coefficient, tables, Markdown."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from lftpipe.base.outputs import COMMENT
from lftpipe.recoupling import ranking
from lftpipe.reporting.tables import cell, escaped, markdown_lines
from lftpipe.results.recoupling import Choice, Correlation, RecouplingMap, Sweep, SweptBlock

# --- Rank correlation of a few pairs of numbers, and how sure one can be of it.

RESAMPLES = 10_000
CONFIDENCE = 0.95

#: With fewer points a rank correlation says nothing.
FEWEST = 3


def spearman(
    x: Float[np.ndarray, "*resample point"], y: Float[np.ndarray, "*resample point"]
) -> Float[np.ndarray, "*resample"]:
    """Spearman's coefficient over the last axis; equal values share a rank. NaN where a side is constant."""
    middle = (x.shape[-1] + 1) / 2
    a, b = rankdata(x, axis=-1) - middle, rankdata(y, axis=-1) - middle
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)


def correlate(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], seed: int) -> dict[str, Any]:
    """Spearman's coefficient with its bootstrap interval, JSON-plain.

    Returns
    -------
    dict
        `points`, `spearman`, and the ends `low` and `high` of the percentile interval of `CONFIDENCE` over
        `RESAMPLES` seeded resamples of the pairs. Resamples in which one side is constant have no
        coefficient and are left out. All None with fewer than `FEWEST` points or a constant side.
    """
    found: dict[str, Any] = {"points": len(x), "spearman": None, "low": None, "high": None}
    if len(x) < FEWEST:
        return found
    coefficient = float(spearman(x, y))
    if np.isnan(coefficient):
        return found
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    values = spearman(x[drawn], y[drawn])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[~np.isnan(values)], [tail, 1 - tail])
    return found | {"spearman": coefficient, "low": float(low), "high": float(high)}


# --- What a sweep found, as tables and a Markdown page. No torch.

#: What a run reached; a block's is the mean over its runs.
OUTCOMES = ("kl", "nmse", "nmse_without_first", "ppl")

#: Outcomes that the predictors are held against.
AGAINST = ("kl", "nmse_without_first")


def _interval(entry: Correlation | None) -> str:
    if entry is None or entry.spearman is None:
        return "-"
    return f"{entry.spearman:.2f} [{entry.low:.2f}, {entry.high:.2f}]"


def correlation_table(result: Sweep, against: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a predictor a row, all blocks and each length a column."""
    entries = {(e.predictor, e.length): e for e in result.correlations if e.against == against}
    columns = [None, *result.lengths]
    counts = {c: sum(c in (None, row.length) for row in result.rows) for c in columns}
    heads = ["all" if length is None else f"length {length}" for length in columns]
    heading = ["predictor", *(f"{head} ({counts[c]})" for head, c in zip(heads, columns, strict=True))]
    keys = {**ranking.PREDICTORS, "length": "length"}
    known = {predictor for predictor, _ in entries}
    table = [
        [name, *(_interval(entries.get((key, c))) for c in columns)]
        for name, key in keys.items()
        if key in known
    ]
    return heading, table


def _choice_table(result: Sweep) -> tuple[list[str], list[list[str]]]:
    heading = ["length", "rank by", "chosen", "its KL", "place", "best", "its KL"]
    table = [
        [
            str(choice.length),
            choice.rank_by,
            choice.block,
            f"{choice.kl:.4g}",
            f"{choice.place} of {choice.of}",
            choice.best_block,
            f"{choice.best_kl:.4g}",
        ]
        for choice in result.choices
    ]
    return heading, table


def markdown(result: Sweep) -> str:
    """Correlations, choices and blocks as a Markdown page."""
    used = result.settings
    columns = ("block", *ranking.PREDICTORS.values(), *OUTCOMES)
    introduction = (
        f"{len(result.rows)} blocks, {used['repeats']} run(s) each: {used['objective']}, "
        f"{used['tokens']:,} training tokens; scored on {result.validation_tokens:,} validation tokens. "
        f"Spearman's coefficient with the {CONFIDENCE:.0%} bootstrap interval over blocks; "
        "positive where a lower figure went with a better score."
    )
    lines = [f"# Does the map predict? ({escaped(result.teacher)})", "", introduction, ""]
    for against in AGAINST:
        lines += [f"## With {against}", "", *markdown_lines(*correlation_table(result, against)), ""]
    lines += ["## What each would choose", "", *markdown_lines(*_choice_table(result)), "", "## Blocks", ""]
    table = [[cell(getattr(row, key)) for key in columns] for row in result.rows]
    return "\n".join([*lines, *markdown_lines(columns, table), "", COMMENT]) + "\n"


def correlations(rows: list[SweptBlock], lengths: list[int], seed: int) -> list[Correlation]:
    """Of every predictor with every outcome: over all blocks (`length` null), and within each length.

    Over all blocks their mere length is a predictor too: what the others have to beat. A predictor that the
    map lacks is left out.
    """
    keys = [key for key in ranking.PREDICTORS.values() if None not in (getattr(row, key) for row in rows)]
    found = []
    for against in AGAINST:
        for length in (None, *lengths):
            here = [row for row in rows if length in (None, row.length)]
            y = np.array([getattr(row, against) for row in here])
            for predictor in (*keys, *(["length"] if length is None else [])):
                x = np.array([getattr(row, predictor) for row in here], np.float64)
                entry = correlate(x, y, seed)
                found.append(Correlation(against=against, predictor=predictor, length=length, **entry))
    return found


def choices(found: RecouplingMap, rows: list[SweptBlock], lengths: list[int]) -> list[Choice]:
    """Which block each predictor would choose, what it reached, and which place that is, 1 the best."""
    chosen = []
    for length in lengths:
        order = sorted((row for row in rows if row.length == length), key=lambda row: row.kl)
        names = [row.block for row in order]
        for by, key in ranking.PREDICTORS.items():
            if getattr(found, key) is None:
                continue
            m, n = ranking.rank_blocks(found, length, by)[0]
            place = names.index(f"{m}:{n}")
            chosen.append(
                Choice(
                    rank_by=by,
                    length=length,
                    block=f"{m}:{n}",
                    kl=order[place].kl,
                    place=place + 1,
                    of=len(order),
                    best_block=names[0],
                    best_kl=order[0].kl,
                )
            )
    return chosen
