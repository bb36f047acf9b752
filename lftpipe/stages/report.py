"""`lftpipe report`: the map, the table and the curves that lie beside a store, on one page. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lftpipe.artefacts.metrics import Metrics, read_metrics
from lftpipe.artefacts.results import Results
from lftpipe.artefacts.run import metrics_digest
from lftpipe.config.settings import ReportSettings
from lftpipe.errors import RunError, StoreError
from lftpipe.outputs import COMMENT, MARK, Staging, making
from lftpipe.reporting.plots import draw_adaptive, draw_steps_curve, draw_training
from lftpipe.reporting.tables import escaped, results_page
from lftpipe.workspace import find_store

#: By what a page is known; the last is that of older versions.
MARKS = (MARK, b" validation tokens; store ")

#: The page's own pictures, which go beside it.
PICTURES = ("steps.png", "adaptive.png", "training.png")


@dataclass(frozen=True)
class Curves:
    """Metrics of the runs that were evaluated, by name."""

    by_run: dict[str, Metrics]

    @classmethod
    def of(cls, result: Results, runs: Path) -> "Curves":
        """Of those in the table whose folders are beside it."""
        names = sorted({row.run for row in result.rows if row.run})
        folders = {name: runs / name for name in names if (runs / name).is_dir()}
        return cls(
            {
                name: read_metrics(each / "metrics.jsonl", metrics_digest(each))
                for name, each in folders.items()
            }
        )

    @property
    def damage(self) -> list[str]:
        """What to say of each damaged file."""
        return [metrics.damage for metrics in self.by_run.values() if metrics.damage]

    @property
    def drawn(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of those that have some."""
        return {name: metrics.rows for name, metrics in self.by_run.items() if metrics.rows}


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write one Markdown page, with pictures, of all that was found beside a store.

    Parameters
    ----------
    settings
        Which store, and where the page goes.

    Returns
    -------
    dict
        The page's path, the pictures it shows, and `damaged`: what could not be read of the runs' metrics.

    Raises
    ------
    LftpipeError
        If nothing was evaluated yet, or the page exists and `force` is not set.
    """
    here = find_store(settings.workspace, settings.store).parent
    out = settings.out or here / "report.md"
    if out.suffix != ".md":
        raise RunError(f"--out {out}", "the Markdown file's name", "end it in .md")
    table = here / "results.json"
    if not table.exists():
        raise StoreError(f"{here} without results.json", "an evaluation", "run `lftpipe evaluate` first")
    result = Results.from_json(table)
    curves = Curves.of(result, here / "runs")
    others = [out.with_name(name) for name in PICTURES]
    with making(out, others, marks=MARKS, force=settings.force) as staging:
        pictures = _draw(result, curves, out, staging)
        if (here / "recoupling.png").exists():
            pictures["Recoupling ratio over all pairs of states (figure 6)"] = here / "recoupling.png"
        staging.path(out).write_text(_page(result, curves, pictures, out))
    shown = [str(path) for path in pictures.values()]
    return {"report": str(out), "pictures": shown, "damaged": curves.damage}


def _draw(result: Results, curves: Curves, out: Path, staging: Staging) -> dict[str, Path]:
    """Draw what there is to draw; captions and final places."""
    steps, adaptive, training = (out.with_name(name) for name in PICTURES)
    pictures = {"KL_x and NMSE against the number of steps (figure 5)": steps}
    draw_steps_curve(result.rows, staging.path(steps))
    if result.adaptive:
        draw_adaptive(result.rows, result.adaptive, staging.path(adaptive))
        pictures["KL against mean NFE, steps fixed and chosen token by token"] = adaptive
    if curves.drawn:
        skips = [row for row in result.rows if row.run is None and row.nmse is not None]
        draw_training(curves.drawn, skips, staging.path(training))
        pictures["NMSE against training tokens (figure 4)"] = training
    return pictures


def _page(result: Results, curves: Curves, pictures: dict[str, Path], out: Path) -> str:
    introduction = f"{result.validation_tokens:,} validation tokens; store {result.store_fingerprint}."
    page = results_page(result, result.teacher, introduction)
    if curves.damage:
        page += ["## Damaged", "", *(f"- {escaped(each)}" for each in curves.damage), ""]
    for caption, path in pictures.items():
        page += [f"## {caption}", "", f"![{caption}]({_relative(path, out)})", ""]
    return "\n".join([*page, COMMENT]) + "\n"


def _relative(path: Path, page: Path) -> str:
    same = path.parent.resolve() == page.parent.resolve()
    return path.name if same else f"<{path.resolve()}>"


def summary(result: dict[str, Any]) -> str:
    """Where the page is, and what is damaged."""
    lines = [f"{result['report']}: one page with {len(result['pictures'])} pictures"]
    return "\n".join([*lines, *(f"  {each}" for each in result["damaged"])])
