"""`lftpipe runs`: every run of a workspace, with what it was made with and what it reached. No torch."""

from lftpipe.base.errors import RunError
from lftpipe.base.workspace import find_store
from lftpipe.config.settings import RunsSettings
from lftpipe.reporting.runs import line_of
from lftpipe.reporting.tables import cell
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.facts import RunList

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


def runs(settings: RunsSettings) -> RunList:
    """List the runs of a workspace, or those beside one store; the lowest KL of each teacher first."""
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
    return RunList(rows=lines)


def summary(result: RunList) -> FittedTable:
    """One line a run."""
    rows = [[cell(getattr(row, key)) for key in COLUMNS] for row in result.rows]
    columns = [
        Column(name, "left" if key in _TEXTS else "right", folds=key in ("teacher", "run"), needed=needed)
        for key, (name, needed) in COLUMNS.items()
    ]
    finished = [row for row in result.rows if row.state == "finished"]
    unscored = sum(row.kl is None for row in finished)
    words = f"{len(rows)} runs, {len(finished)} finished"
    words += f"; {unscored} not evaluated: lftpipe evaluate" if unscored else ""
    return FittedTable(columns, rows, caption=words)
