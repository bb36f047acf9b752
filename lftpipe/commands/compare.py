"""`lftpipe compare`: what two runs differ in, settings and results. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group

from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.workspace import find_run
from lftpipe.config.settings import CompareSettings
from lftpipe.reporting.runs import MEASURES, comparison, shown
from lftpipe.reporting.tables import cell
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.facts import Comparison


def compare(settings: CompareSettings) -> Comparison:
    """Compare two finished runs.

    Raises `LftpipeError` if there are not two finished runs of these names.

    Returns
    -------
    Comparison
        Settings, origins and scores; what differs is a pair of values.
    """
    if len(settings.runs) != 2:
        raise SettingsError(f"{len(settings.runs)} runs to compare", "two of them", "name two runs")
    one, other = (find_run(settings.workspace, settings.store, name) for name in settings.runs)
    return comparison(_finished(one), _finished(other))


def _finished(run: Path) -> Path:
    if not (run / "manifest.json").is_file():
        raise RunError(f"{run}", "a finished run", "name one that `lftpipe runs` lists as finished")
    return run


def summary(result: Comparison) -> Group:
    """A table of settings, one of where they come from, one of results."""
    one, other = (row.run for row in result.runs)
    heads = [one, other] if one != other else [row.path for row in result.runs]

    def table(title: str, rows: list[list[str]], caption: str = "") -> FittedTable:
        columns = [Column("", "left"), *(Column(name, "left", folds=True) for name in heads)]
        return FittedTable(columns, rows, title=title, caption=caption)

    parts: list[Any] = [_pairs(table, "settings that differ", result.settings, result.same_settings)]
    if result.made_from:
        parts.append(_pairs(table, "\nmade from", result.made_from))
    if result.results:
        rows = [[MEASURES[key], *map(cell, pair)] for key, pair in result.results.items()]
        parts.append(table("\nresults, at the steps with the lowest KL of each", rows))
    else:
        parts.append("\nno results: `lftpipe evaluate` scores both")
    return Group(*parts)


def _pairs(
    table: Callable[..., FittedTable], title: str, pairs: dict[str, list[Any]], same: int | None = None
) -> FittedTable | str:
    caption = "" if same is None else f"{same} settings are the same"
    if not pairs:
        return f"{title}: none; {caption}"
    return table(title, [[key, *map(shown, pair)] for key, pair in pairs.items()], caption)
