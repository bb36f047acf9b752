"""Table 1's columns, and how a table of results reads as Markdown. No torch."""

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
