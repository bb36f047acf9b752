"""The recoupling map as one self-contained HTML page: hover a pair, see its numbers and its transport."""

import json
from html import escape
from importlib import resources
from typing import Any

from matplotlib import colormaps

from lftpipe.report.heatmap import COLOUR_MAP

#: What the page shows of the map.
_KEYS = (
    "layers",
    "ratio",
    "ratio_raw",
    "ratio_stderr",
    "transport_cost",
    "identity_cost",
    "random_cost",
    "relative_gap",
    "relative_displacement",
    "partners",
    "approximate",
    "settings",
    "store_fingerprint",
)


def recoupling_page(recoupling: dict[str, Any]) -> str:
    """The page's text; it loads nothing from elsewhere."""
    colours = [[round(255 * part) for part in colormaps[COLOUR_MAP](step / 31)[:3]] for step in range(32)]
    data = {key: recoupling[key] for key in _KEYS} | {"colours": colours}
    page = resources.files("lftpipe.report").joinpath("heatmap.html").read_text("utf-8")
    # A text that ends a script element must not end this one.
    embedded = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return page.replace("{{teacher}}", escape(recoupling["teacher"] or "teacher")).replace(
        "{{data}}", embedded
    )
