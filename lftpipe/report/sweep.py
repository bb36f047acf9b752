"""What a sweep found, as tables and a Markdown page. No torch."""

from typing import Any

from lftpipe.evaluation import correlation
from lftpipe.recoupling import ranking
from lftpipe.report.tables import cell

#: What a run reached; a block's is the mean over its runs.
OUTCOMES = ("kl", "nmse", "nmse_without_first", "ppl")

#: Outcomes that the predictors are held against.
AGAINST = ("kl", "nmse_without_first")

Result = dict[str, Any]


def _interval(entry: dict[str, Any]) -> str:
    if entry["spearman"] is None:
        return "-"
    return f"{entry['spearman']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def correlation_table(result: Result, against: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a predictor a row, all blocks and each length a column."""
    entries = {(e["predictor"], e["length"]): e for e in result["correlations"] if e["against"] == against}
    columns = [None, *result["lengths"]]
    counts = {length: entries["ratio", length]["points"] for length in columns}
    heads = ["all" if length is None else f"length {length}" for length in columns]
    heading = ["predictor", *(f"{head} ({counts[c]})" for head, c in zip(heads, columns, strict=True))]
    keys = {**ranking.PREDICTORS, "length": "length"}
    table = [
        [name, *(_interval(entries[key, c]) if (key, c) in entries else "-" for c in columns)]
        for name, key in keys.items()
    ]
    return heading, table


def _choice_table(result: Result) -> tuple[list[str], list[list[str]]]:
    heading = ["length", "rank by", "chosen", "its KL", "place", "best", "its KL"]
    table = [
        [
            str(choice["length"]),
            choice["rank_by"],
            choice["block"],
            f"{choice['kl']:.4g}",
            f"{choice['place']} of {choice['of']}",
            choice["best_block"],
            f"{choice['best_kl']:.4g}",
        ]
        for choice in result["choices"]
    ]
    return heading, table


def _lines(heading: list[str], table: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *table)]


def markdown(result: Result) -> str:
    """Correlations, choices and blocks as a Markdown page."""
    used = result["settings"]
    columns = ("block", *ranking.PREDICTORS.values(), *OUTCOMES)
    lines = [
        f"# Does the map predict? ({result['teacher']})",
        "",
        f"{len(result['rows'])} blocks, {used['repeats']} run(s) each: {used['objective']}, "
        f"{used['tokens']:,} training tokens; scored on {result['validation_tokens']:,} validation tokens. "
        f"Spearman's coefficient with the {correlation.CONFIDENCE:.0%} bootstrap interval over blocks; "
        "positive where a lower figure went with a better score.",
        "",
    ]
    for against in AGAINST:
        lines += [f"## With {against}", "", *_lines(*correlation_table(result, against)), ""]
    lines += ["## What each would choose", "", *_lines(*_choice_table(result)), "", "## Blocks", ""]
    table = [[cell(row[key]) for key in columns] for row in result["rows"]]
    return "\n".join([*lines, *_lines(list(columns), table)]) + "\n"
