"""`lftpipe report`: everything that lies beside a store, as one HTML page and as Markdown. No torch."""

from pathlib import Path

from lftpipe.base.errors import RunError, StoreError
from lftpipe.base.outputs import COMMENT, MARK, Staging, making
from lftpipe.base.workspace import find_store
from lftpipe.config.settings import ReportSettings
from lftpipe.reporting.pages import Found, collect, report_page
from lftpipe.reporting.plots import draw_adaptive, draw_steps_curve, draw_training
from lftpipe.reporting.tables import escaped, results_page
from lftpipe.results.outcomes import ReportPage

#: By what a page is known.
MARKS = (MARK,)

#: The page's own pictures, which go beside it.
PICTURES = ("steps.png", "adaptive.png", "training.png")


def report(settings: ReportSettings) -> ReportPage:
    """Write one self-contained HTML page, and the same as Markdown with pictures, of what is beside a store.

    Returns the pages' paths, the pictures, and `damaged`: what could not be read.
    Raises `LftpipeError` if nothing was evaluated yet, or the page exists and `force` is not set.
    """
    here = find_store(settings.workspace, settings.store).parent
    out = settings.out or here / "report.md"
    if out.suffix != ".md":
        raise RunError(f"--out {out}", "the Markdown file's name", "end it in .md")
    table = here / "results.json"
    if not table.exists():
        raise StoreError(f"{here} without results.json", "an evaluation", "run `lftpipe evaluate` first")
    found = collect(here)
    page = out.with_suffix(".html")
    others = [page, *(out.with_name(name) for name in PICTURES)]
    with making(out, others, marks=MARKS, force=settings.force) as staging:
        pictures = _draw(found, out, staging)
        if (here / "recoupling.png").exists():
            pictures["Recoupling ratio over all pairs of states (figure 6)"] = here / "recoupling.png"
        staging.path(page).write_text(report_page(found), encoding="utf-8")
        staging.path(out).write_text(_page(found, pictures, out), encoding="utf-8")
    shown = [str(path) for path in pictures.values()]
    return ReportPage(report=str(page), markdown=str(out), pictures=shown, damaged=found.damage)


def _draw(found: Found, out: Path, staging: Staging) -> dict[str, Path]:
    """Draw what there is to draw; captions and final places."""
    result = found.results
    steps, adaptive, training = (out.with_name(name) for name in PICTURES)
    pictures = {"KL_x and NMSE against the number of steps (figure 5)": steps}
    draw_steps_curve(result.rows, staging.path(steps))
    if result.adaptive:
        draw_adaptive(result.rows, result.adaptive, staging.path(adaptive))
        pictures["KL against mean NFE, steps fixed and chosen token by token"] = adaptive
    if found.lines:
        skips = [row for row in result.rows if row.run is None and row.nmse is not None]
        draw_training(found.lines, skips, staging.path(training))
        pictures["NMSE against training tokens (figure 4)"] = training
    return pictures


def _page(found: Found, pictures: dict[str, Path], out: Path) -> str:
    result = found.results
    introduction = f"{result.validation_tokens:,} validation tokens; store {result.store_fingerprint}."
    page = results_page(result, result.teacher, introduction)
    if found.damage:
        page += ["## Damaged", "", *(f"- {escaped(each)}" for each in found.damage), ""]
    for caption, path in pictures.items():
        page += [f"## {caption}", "", f"![{caption}]({_relative(path, out)})", ""]
    return "\n".join([*page, COMMENT]) + "\n"


def _relative(path: Path, page: Path) -> str:
    same = path.parent.resolve() == page.parent.resolve()
    return path.name if same else f"<{path.resolve()}>"


def summary(result: ReportPage) -> str:
    """Where the page is, and what is damaged."""
    lines = [f"{result.report}: open it in a browser; {result.markdown} has the same in Markdown"]
    return "\n".join([*lines, *(f"  {each}" for each in result.damaged)])
