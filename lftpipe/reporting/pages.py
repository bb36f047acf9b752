"""Self-contained HTML pages: one file, no outside reference, works from `file://`. No torch.

A page is a body, data as JSON, and the scripts of `lftpipe/reporting/page/` that draw the data. What comes
from outside (names of models, corpora and runs, prompts, texts) goes into the data, which scripts show as
text, or through `html.escape`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from typing import Any

from matplotlib import colormaps

from lftpipe.base.version import __version__
from lftpipe.reporting.collect import Found
from lftpipe.reporting.plots import COLOUR_MAP, PREDICTOR_LABELS
from lftpipe.reporting.tables import COLUMNS, more_sections
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.results.scores import Score
from lftpipe.results.sweep import Sweep

#: Colours of the map's scale.
COLOUR_STEPS = 32

#: What the page shows of a map; the last only where a map has it.
MAP_KEYS = (
    *("layers", "ratio", "ratio_raw", "ratio_stderr", "transport_cost", "identity_cost", "random_cost"),
    *("relative_gap", "relative_displacement", "partners", "approximate", "settings", "store_fingerprint"),
    "influence",
)


def report_page(found: Found) -> str:
    """The page of a store: headline, Table 1, trade-offs, curves, map, sweep, texts, commands."""
    results = found.results
    rows = [row.to_json() for row in results.rows]
    data = {
        "teacher": results.teacher,
        "rows": rows,
        "columns": [[key, name] for key, name in COLUMNS.items() if any(key in row for row in rows)],
        "sections": [asdict(each) for each in more_sections(results.rows, results.comparisons or ())],
        "adaptive": [row.to_json() for row in results.adaptive or ()],
        "curves": found.lines,
        "damaged": found.damage,
        "map": None if found.recoupling is None else map_data(found.recoupling, _best_block(results.rows)),
        "sweep": None if found.sweep is None else _sweep_data(found.sweep),
        "samples": found.samples,
        "runs": found.runs,
        "commands": found.commands,
    }
    body = _fill(_part("report.html"), {"map": _part("map.html")})
    about = f"{results.validation_tokens:,} validation tokens; store {results.store_fingerprint}"
    body = body.replace('id="about"></p>', f'id="about">{escape(about)}</p>')
    scripts = ("base.js", "chart.js", "table.js", "results.js", "extras.js", "map.js", "contents.js")
    return page(f"Students of {results.teacher}", body, data, scripts)


def _sweep_data(sweep: Sweep) -> dict[str, Any]:
    """The sweep, and the figures that all its blocks have."""
    names = [
        [key, name]
        for key, name in PREDICTOR_LABELS.items()
        if all(getattr(row, key) is not None for row in sweep.rows)
    ]
    return sweep.to_json() | {"predictors": names}


def recoupling_page(recoupling: RecouplingMap) -> str:
    """The page of a map alone."""
    title = f"Recoupling map of {recoupling.teacher or 'a teacher'}"
    return page(title, _part("map.html"), {"map": map_data(recoupling)}, ("base.js", "map.js", "contents.js"))


def map_data(recoupling: RecouplingMap, shown: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the script of the map draws: the map, its colours, and the pair that it shows at first.

    Parameters
    ----------
    shown
        A block `(m, n)`; left out, or not on the map, the first pair is shown.
    """
    colours = [
        [round(255 * part) for part in colormaps[COLOUR_MAP](step / (COLOUR_STEPS - 1))[:3]]
        for step in range(COLOUR_STEPS)
    ]
    layers = recoupling.layers
    on_map = shown is not None and all(layer in layers for layer in shown)
    first = [layers.index(layer) for layer in shown] if shown and on_map else [0, 1]
    found = recoupling.to_json()
    kept = {key: found[key] for key in MAP_KEYS if found.get(key) is not None}
    return kept | {"colours": colours, "shown": first}


def page(title: str, body: str, data: dict[str, Any], scripts: tuple[str, ...]) -> str:
    """One HTML file.

    Parameters
    ----------
    data
        For the scripts; numbers that are not finite become null.
    """
    embedded = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return _fill(
        _part("page.html"),
        {
            "title": escape(title),
            "style": _part("page.css"),
            "body": body,
            "version": escape(__version__),
            # No text can end the element that it stands in, or begin a comment there.
            "data": embedded.replace("<", "\\u003c"),
            "script": "\n".join(_part(name) for name in scripts),
        },
    )


def _part(name: str) -> str:
    return (resources.files("lftpipe.reporting") / "page" / name).read_text("utf-8")


def _fill(template: str, parts: dict[str, str]) -> str:
    """Put parts in the places of `{{name}}`, in one pass: what was put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts.get(place[1], place[0]), template)


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _best_block(rows: Sequence[Score]) -> tuple[int, int] | None:
    """The block of the student with the lowest KL; None of one with several blocks."""
    best = min(
        (row for row in rows if row.run and row.kl is not None), key=lambda row: row.kl or 0, default=None
    )
    match = re.fullmatch(r"(\d+):(\d+)", best.block or "") if best else None
    return (int(match[1]), int(match[2])) if match else None
