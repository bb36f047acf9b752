"""The HTML pages: what is in them, and what a browser makes of them."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
from fake_maps import make_map
from report_data import results

from lftpipe.reporting.pages import Found, recoupling_page, report_page
from lftpipe.results.run import Metrics
from lftpipe.results.scores import TaskScore

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")

#: What a page must not have: an address, or anything that a browser would fetch.
OUTSIDE = r"(https?:)?//[a-z]+\.|\bsrc=|@import|<link|url\("


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def whole(**changes):
    """A page with all sections."""
    curves = {
        f"walk-seed{s}": Metrics([{"tokens": 64 * i, "loss": 1 / i, "nmse": 2 / i} for i in (1, 2, 3)])
        for s in (0, 1)
    }
    sample = {
        "prompt": "once",
        "teacher": "tiny",
        "run": "walk-seed0",
        "teacher_text": "upon",
        "student_text": "up",
    }
    given = {
        "results": results(),
        "curves": curves,
        "recoupling": make_map(5),
        "samples": [sample | {"common_tokens": 1}],
        "commands": ["lftpipe extract --model tiny"],
        **{"sweep": None, "runs": [], "damage": []},
    }
    return report_page(Found(**given | changes))


def in_browser(page, script, folder):
    """The document after `script` has run in the loaded page; fails if the page had an error."""
    watch = "<script>addEventListener('error', e => { document.title = 'ERROR ' + e.message; });"
    watch += "addEventListener('securitypolicyviolation', e => { document.title = 'REQUEST'; });</script>"
    after = f"<script>addEventListener('load', () => {{ {script} }});</script></html>"
    path = folder / "page.html"
    path.write_text(page.replace("<head>", f"<head>{watch}", 1).replace("</html>", after))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [str(BROWSER), *options, f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout, re.S)
    assert title
    assert not title[1].startswith(("ERROR", "REQUEST")), title[1]
    return done.stdout


@pytest.mark.parametrize("page", [whole(), recoupling_page(make_map(5))], ids=["report", "map"])
def test_a_page_is_self_contained(page):
    assert not re.search(OUTSIDE, page)
    assert "{{" not in page


def test_a_page_holds_the_numbers():
    recoupling = make_map(5)
    data = data_of(whole(recoupling=recoupling))
    assert data["rows"] == [row.to_json() for row in results().rows]
    assert data["map"]["ratio"] == recoupling.ratio
    assert data["map"]["shown"] == [1, 3], "the best student's block"
    assert len(data["map"]["colours"]) == 32


def test_numbers_that_are_not_finite_leave_valid_json():
    found = results()
    rows = [dataclasses.replace(found.rows[2], kl=float("nan")), *found.rows]
    assert data_of(whole(results=dataclasses.replace(found, rows=rows)))["rows"][0]["kl"] is None


@pytest.mark.parametrize(
    "evil", ["</script><b>x", "</title><b>x", "<img src=x onerror=alert(1)>", "<!--<script>"]
)
def test_a_name_cannot_break_out_of_a_page(evil):
    sample = {"prompt": evil, "teacher": evil, "run": evil, "teacher_text": evil, "student_text": evil}
    found = {
        "results": results(run=evil, teacher=evil),
        "samples": [sample | {"common_tokens": 1}],
        "commands": [evil],
    }
    for page in (whole(**found), recoupling_page(make_map(3, teacher=evil, store_fingerprint=evil))):
        assert evil not in page
        assert page.count("</script>") == 2


@needs_browser
def test_a_browser_draws_all_sections_without_an_error(tmp_path):
    shown = in_browser(whole(), "", tmp_path)
    assert shown.count("<figure>") == 6, "two of each: trade-offs, steps, training"
    assert "once" in shown
    assert "upon" in shown
    assert "lftpipe extract --model tiny" in shown
    assert 'href="#recoupling"' in shown
    assert 'href="#blocks"' not in shown, "links to what is there alone"


def with_tasks():
    known = {"metric": "acc", "teacher": 0.7, "kept_above_chance": 0.5, "chance": 0.5, "documents": 100}
    score = TaskScore(**known, value=0.6125, stderr=0.0492, kept=0.875)
    found = results()
    rows = [*found.rows[:-1], dataclasses.replace(found.rows[-1], tasks={"piqa": score}, tasks_mean=score)]
    return whole(results=dataclasses.replace(found, rows=rows))


def test_a_page_has_the_tables_that_rows_have_something_for():
    assert data_of(whole())["sections"] == []
    (section,) = data_of(with_tasks())["sections"]
    assert section["title"] == "Tasks"
    assert section["cells"] == [["walk-seed1", "3", "0.6125 ± 0.049", "0.6125 ± 0.049", "87.5 %", "50.0 %"]]


@needs_browser
def test_a_browser_shows_scores_on_tasks(tmp_path):
    shown = in_browser(with_tasks(), "", tmp_path)
    assert 'href="#tasks"' in shown
    assert '<td class="">0.6125 ± 0.049</td>' in shown


@needs_browser
def test_seeds_fold_into_means_with_an_interval(tmp_path):
    shown = in_browser(whole(), "", tmp_path)
    assert re.search(r"0\.31 ± 0\.13", shown), "mean of 0.3 and 0.32, t(1) = 12.71"
    unfolded = in_browser(whole(), "document.getElementById('fold').click();", tmp_path)
    assert "±" not in unfolded.split("<tbody>")[1].split("</tbody>")[0]


@needs_browser
def test_the_table_sorts_and_filters(tmp_path):
    click = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'KL').click();"
    body = in_browser(whole(), click, tmp_path).split("<tbody>")[1]
    assert body.index("walk") < body.index("skip layers 1-2") < body.index("teacher"), (
        "ascending, missing last"
    )
    search = "const s = document.querySelector('input[type=search]'); s.value = 'skip';"
    body = in_browser(whole(), search + "s.dispatchEvent(new Event('input'));", tmp_path).split("<tbody>")[1]
    assert "walk" not in body.split("</tbody>")[0]


@needs_browser
def test_charts_are_read_by_pointer_and_keyboard(tmp_path):
    keys = "const s = document.querySelector('#pareto svg');"
    keys += "s.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    assert "walk, k = 1, midpoint, NFE 2: KL 0.31" in in_browser(whole(), keys, tmp_path)
    hover = "const s = document.querySelector('#pareto svg'), box = s.getBoundingClientRect();"
    hover += "s.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right, clientY: box.bottom}));"
    assert "walk, k = 3, midpoint, NFE 6: KL 0.11" in in_browser(whole(), hover, tmp_path)


@needs_browser
def test_the_map_shows_what_is_hovered(tmp_path):
    recoupling = make_map(5)
    hover = """const map = document.getElementById("map"), box = map.getBoundingClientRect();
      const point = {clientX: box.left + 46 + 4.5 * 34, clientY: box.top + 2.5 * 34};
      map.dispatchEvent(new PointerEvent("pointermove", point));
      const canvases = [map, document.getElementById("plan")];
      document.title = canvases.every(each => each.toDataURL().length > 2000);"""
    shown = in_browser(recoupling_page(recoupling), hover, tmp_path)
    assert "<title>true</title>" in shown
    assert "block 2:4, 2 layers" in shown
    assert f'<td class="text">R</td><td>{recoupling.ratio[2][4]:.4g}</td>' in shown


@needs_browser
def test_a_chart_of_one_run_has_no_legend_and_nothing_in_its_place(tmp_path):
    shown = in_browser(whole(results=results(seeds=1)), "", tmp_path)
    assert shown.count("<figure>") >= 2
    assert "</svg>null" not in shown
