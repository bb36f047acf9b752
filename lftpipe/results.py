"""Table 1's columns, and how a table of results reads as Markdown. No torch."""

from typing import Any

#: Keys of a row of `results.json` and their headings.
COLUMNS = {
    "method": "method",
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


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    return lines + ["| " + " | ".join(cell(row[key]) for key in COLUMNS) + " |" for row in rows]


def cell(value: Any) -> str:
    """A number as it reads best; `-` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
