"""`lftpipe runs`: every run of a workspace, with what it was made with and what it reached. No torch."""

from typing import Any

from lftpipe.config.settings import RunsSettings
from lftpipe.errors import RunError
from lftpipe.reporting.runs import line_of
from lftpipe.reporting.tables import cell
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.workspace import find_store

#: Headings, and whether a narrow terminal still shows the column.
COLUMNS = {
    "teacher": ("teacher", True),
    "run": ("run", True),
    "block": ("block", True),
    "objective": ("objective", True),
    "kl": ("KL", True),
    "train_tokens": ("tokens", True),
    "state": ("state", True),
    "seed": ("seed", False),
    "ppl": ("PPL", False),
    "agreement": ("agreement", False),
    "solver": ("solver", False),
    "k": ("k", False),
    "nfe": ("NFE", False),
}

_TEXTS = ("teacher", "run", "block", "objective", "solver", "state")


def runs(settings: RunsSettings) -> dict[str, Any]:
    """List the runs of a workspace, or those beside one store; the lowest KL of each teacher first.

    Parameters
    ----------
    settings
        Which workspace or store.

    Returns
    -------
    dict
        `rows`, one for each run, JSON-plain.

    Raises
    ------
    LftpipeError
        If there is no run.
    """
    if settings.store is not None:
        place = find_store(settings.workspace, settings.store).parent / "runs"
        found = place.glob("*/settings.toml")
    else:
        place = settings.workspace
        found = place.glob("*/runs/*/settings.toml")
    lines = [line_of(path.parent) for path in found]
    if not lines:
        raise RunError(f"{place} without runs", "at least one", "make one with `lftpipe train --from-cache`")
    lines.sort(key=lambda line: (line.teacher, line.kl is None, line.kl or 0.0, line.run))
    return {"rows": [line.to_json() for line in lines]}


def summary(result: dict[str, Any]) -> FittedTable:
    """One line a run."""
    rows = [[cell(row[key]) for key in COLUMNS] for row in result["rows"]]
    columns = [
        Column(name, "left" if key in _TEXTS else "right", folds=key in ("teacher", "run"), needed=needed)
        for key, (name, needed) in COLUMNS.items()
    ]
    finished = sum(row["state"] == "finished" for row in result["rows"])
    unscored = sum(row["state"] == "finished" and row["kl"] is None for row in result["rows"])
    words = f"{len(rows)} runs, {finished} finished"
    words += f"; {unscored} not evaluated: lftpipe evaluate" if unscored else ""
    return FittedTable(columns, rows, caption=words)
