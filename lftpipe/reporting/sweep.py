"""What a sweep found, as tables and a Markdown page. No torch."""

import numpy as np

from lftpipe.artefacts.recoupling import RecouplingMap
from lftpipe.artefacts.sweep import Choice, Correlation, Sweep, SweptBlock
from lftpipe.evaluation import correlation
from lftpipe.outputs import COMMENT
from lftpipe.recoupling import ranking
from lftpipe.reporting.tables import cell, escaped, markdown_lines

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
        f"Spearman's coefficient with the {correlation.CONFIDENCE:.0%} bootstrap interval over blocks; "
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
                entry = correlation.correlate(x, y, seed)
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
