"""Table 1's columns, and how a table of results reads as Markdown. No torch."""

import re
from typing import Any

#: Keys of a row of `results.json` and their headings.
COLUMNS = {
    "method": "method",
    "run": "run",
    "block": "block",
    "k": "k",
    "solver": "solver",
    "nfe": "NFE",
    "kl_latent": "KL_x",
    "nmse": "NMSE",
    "nmse_without_first": "NMSE w/o first",
    "kl": "KL",
    "ppl": "PPL",
    "parameters": "parameters",
    "ms_per_token": "ms/token",
    "seed": "seed",
    "train_tokens": "train tokens",
}

#: Of the table of steps chosen token by token, fixed steps beside them.
ADAPTIVE_COLUMNS = {
    "method": "method",
    "run": "run",
    "block": "block",
    "threshold": "threshold",
    "k": "k at most",
    "solver": "solver",
    "nfe": "mean NFE",
    "nfe_with_keys": "NFE with keys",
    "kl_latent": "KL_x",
    "nmse": "NMSE",
    "nmse_without_first": "NMSE w/o first",
    "kl": "KL",
    "ppl": "PPL",
    "seed": "seed",
    "train_tokens": "train tokens",
}


def markdown_table(rows: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> list[str]:
    """The lines of a Markdown table of some keys of rows, under their headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]


#: Of the table of means over seeds.
MEAN_COLUMNS = {
    "run": "run",
    "block": "block",
    "k": "k",
    "solver": "solver",
    "nfe": "NFE",
    "seeds": "seeds",
    "nmse": "NMSE",
    "kl": "KL",
    "kl_low": "lowest",
    "kl_high": "highest",
    "ppl": "PPL",
    "train_tokens": "train tokens",
}


def means_over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of runs that differ by nothing but their seed, as one: means, and the range of KL.

    They are known by their names, which end in `-seedS`; those of a single seed are left out.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["run"] and (named := re.fullmatch(r"(.+)-seed\d+", row["run"])):
            key = (named[1], *(row[key] for key in ("method", "block", "k", "solver", "nfe", "train_tokens")))
            groups.setdefault(key, []).append(row)
    means = []
    for (name, *_), group in groups.items():
        if len(group) > 1:
            average = {
                key: sum(row[key] for row in group) / len(group)
                for key in ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl")
            }
            spread = {"kl_low": min(row["kl"] for row in group), "kl_high": max(row["kl"] for row in group)}
            means.append(group[0] | average | spread | {"run": name, "seed": None, "seeds": len(group)})
    return means


def means_section(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table of means over seeds; none if no two runs differ by their seed alone."""
    means = means_over_seeds(rows)
    return ["## Means over seeds", "", *markdown_table(means, MEAN_COLUMNS), ""] if means else []


def adaptive_section(result: dict[str, Any]) -> list[str]:
    """The lines that compare steps chosen token by token with fixed ones; none if nothing was measured."""
    chosen = result.get("adaptive", [])
    if not chosen:
        return []
    runs = {row["run"] for row in chosen}
    rows = [
        row | {"threshold": None, "nfe_with_keys": row["nfe"]} for row in result["rows"] if row["run"] in runs
    ]
    rows = sorted(rows + chosen, key=lambda row: (row["run"], row["nfe"]))
    return [
        "## Steps per token",
        "",
        "A token is finished once an evaluation changes its predicted end by less than the threshold "
        "(relative); `-` is a fixed number of steps. A finished token is counted as evaluated no more, in "
        "`NFE with keys` as paying for keys and values until the last step. Nothing is faster on the clock.",
        "",
        *markdown_table(rows, ADAPTIVE_COLUMNS),
        "",
    ]


def cell(value: Any) -> str:
    """A number as it reads best; `-` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
