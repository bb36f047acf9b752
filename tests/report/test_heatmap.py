"""The map's pictures, drawn from maps of several sizes."""

import json
import re
import shutil
import subprocess
from itertools import combinations

import matplotlib.image
import numpy as np
import pytest

from lftpipe.report.heatmap import draw_recoupling
from lftpipe.report.pages import recoupling_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def a_map(size, tokens=32, **changes):
    rng = np.random.default_rng(size)
    layers = list(range(size))
    square = [[float(rng.uniform()) if m < n else None for n in layers] for m in layers]
    partners = [[rng.permutation(tokens).tolist() if m < n else None for n in layers] for m in layers]
    figures = ("ratio", "ratio_raw", "transport_cost", "identity_cost", "random_cost", "relative_gap")
    return {
        "layers": layers,
        **dict.fromkeys((*figures, "ratio_stderr", "relative_displacement"), square),
        "partners": partners,
        "teacher": "tiny",
        "approximate": False,
        "settings": {
            "batches": 2,
            "tokens": tokens,
            "metric": "euclidean",
            "standardise": True,
            "skip_first": True,
        },
        "store_fingerprint": "f" * 32,
        **changes,
    }


@pytest.mark.parametrize("size", [2, 13, 33])
def test_the_figure_grows_so_that_cells_stay_readable(tmp_path, size):
    path = tmp_path / "map.png"
    draw_recoupling(a_map(size), [(0, 1), (0, size - 1)][: size - 1], path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert min(height, width) > 0.25 * 150 * size  # inches a cell, at 150 dots an inch
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_a_map_can_be_drawn_without_transport_or_with_many(tmp_path):
    draw_recoupling(a_map(4), [], tmp_path / "none.png")
    draw_recoupling(a_map(4), list(combinations(range(4), 2)), tmp_path / "many.png")
    assert (
        matplotlib.image.imread(tmp_path / "none.png").shape[1]
        < matplotlib.image.imread(tmp_path / "many.png").shape[1]
    )


def test_the_page_is_self_contained_and_holds_the_numbers():
    recoupling = a_map(5)
    page = recoupling_page(recoupling)
    assert not re.search(r"(https?:)?//\w|src=|@import|<link", page)
    assert "{{" not in page
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M)[1])
    assert data["ratio"] == recoupling["ratio"]
    assert data["partners"] == recoupling["partners"]
    assert len(data["colours"]) == 32


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_the_page_and_shows_what_is_hovered(tmp_path):
    recoupling = a_map(5)
    hover = """<script>addEventListener("load", () => {
      const map = document.getElementById("map"), box = map.getBoundingClientRect();
      const point = {clientX: box.left + 50 + 4.5 * 34, clientY: box.top + 2.5 * 34};
      map.dispatchEvent(new MouseEvent("mousemove", point));
      const canvases = [map, document.getElementById("plan")];
      document.title = canvases.every(each => each.toDataURL().length > 2000);
    })</script></html>"""
    path = tmp_path / "map.html"
    path.write_text(recoupling_page(recoupling).replace("</html>", hover))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *options, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert "<title>true</title>" in done.stdout
    assert "block 2:4, 2 layers" in done.stdout
    assert f"<td>R</td><td>{recoupling['ratio'][2][4]:.4g}</td>" in done.stdout


def test_a_name_cannot_break_out_of_the_page():
    page = recoupling_page(a_map(3, teacher="</title><b>x", store_fingerprint="</script><b>y"))
    assert "<b>x" not in page and "</script><b>" not in page
    assert page.count("</script>") == 1
