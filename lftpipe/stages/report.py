"""`lftpipe report`: the map, the table and the curves that lie beside a store, on one page. No torch."""

import json
from pathlib import Path
from typing import Any

from lftpipe.config.settings import ReportSettings
from lftpipe.errors import RunError, StoreError
from lftpipe.files import write_atomic
from lftpipe.report.plots import draw_adaptive, draw_steps_curve, draw_training
from lftpipe.report.tables import adaptive_section, markdown_table, means_section
from lftpipe.workspace import find_store


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write one Markdown page, with pictures, of all that was found beside a store.

    Returns
    -------
    dict
        The page's path and the pictures it shows.

    Raises
    ------
    LftpipeError
        If nothing was evaluated yet, or the page exists and `force` is not set.
    """
    here = find_store(settings.workspace, settings.store).parent
    out = settings.out or here / "report.md"
    if out.exists() and not settings.force:
        raise RunError(f"{out}, which exists", "a new file", "pass --force or another --out")
    table = here / "results.json"
    if not table.exists():
        raise StoreError(f"{here} without results.json", "an evaluation", "run `lftpipe evaluate` first")
    result = json.loads(table.read_text())
    drawn = out.parent  # the page's own pictures go beside it
    drawn.mkdir(parents=True, exist_ok=True)
    names = ("steps.png", "adaptive.png", "training.png")
    if (old := [drawn / name for name in names if (drawn / name).exists()]) and not settings.force:
        raise RunError(f"{old[0]}, which exists", "a new file", "pass --force or an --out in another folder")
    pictures = {"KL_x and NMSE against the number of steps (figure 5)": drawn / "steps.png"}
    draw_steps_curve(result["rows"], drawn / "steps.png")
    if result.get("adaptive"):
        draw_adaptive(result["rows"], result["adaptive"], drawn / "adaptive.png")
        pictures["KL against mean NFE, steps fixed and chosen token by token"] = drawn / "adaptive.png"
    evaluated = sorted({row["run"] for row in result["rows"] if row["run"]})
    curves = {name: _metrics(here / "runs" / name / "metrics.jsonl") for name in evaluated}
    if curves := {name: rows for name, rows in curves.items() if rows}:
        skips = [row for row in result["rows"] if row["run"] is None and row["nmse"] is not None]
        draw_training(curves, skips, drawn / "training.png")
        pictures["NMSE against training tokens (figure 4)"] = drawn / "training.png"
    if (here / "recoupling.png").exists():
        pictures["Recoupling ratio over all pairs of states (figure 6)"] = here / "recoupling.png"
    page = [
        f"# {result['teacher']}",
        "",
        f"{result['validation_tokens']:,} validation tokens; store {result['store_fingerprint']}.",
        "",
        *markdown_table(result["rows"]),
        "",
        *means_section(result["rows"]),
        *adaptive_section(result),
    ]
    for caption, path in pictures.items():
        page += [f"## {caption}", "", f"![{caption}]({_relative(path, out)})", ""]
    write_atomic(out, ("\n".join(page)).encode())
    return {"report": str(out), "pictures": [str(path) for path in pictures.values()]}


def _relative(path: Path, page: Path) -> str:
    same = path.parent.resolve() == page.parent.resolve()
    return path.name if same else str(path.resolve())


def _metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed
            break
    return rows


def summary(result: dict[str, Any]) -> str:
    """Where the page is."""
    return f"{result['report']}: one page with {len(result['pictures'])} pictures"
