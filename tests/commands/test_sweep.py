"""A sweep over all blocks of two lengths: what it trains, what it writes, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, extracted
from rich.console import Console
from scipy import stats

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.cli import app as cli
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.recouple import recouple
from lftpipe.commands.sweep import summary, sweep
from lftpipe.config.settings import EvaluateSettings, RecoupleSettings, SweepSettings
from lftpipe.recoupling.probe import draw_parts, probe_residual
from lftpipe.recoupling.ranking import PREDICTORS
from lftpipe.reporting.plots import PREDICTOR_LABELS
from lftpipe.results.outcomes import Sweeping
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.store import Store
from lftpipe.training import step as training_step


@pytest.fixture(scope="module")
def store(tmp_path_factory, stores) -> Path:
    """A store of our own with its map beside it."""
    path = tmp_path_factory.mktemp("swept") / "neox" / "states.zarr"
    shutil.copytree(stores["neox"], path)
    recouple(RecoupleSettings(store=path, tokens=64, batches=3))
    return path


def settings_of(store: Path, folder: Path, **changes: Any) -> SweepSettings:
    given = {
        "store": store,
        "lengths": (1, 2),
        "tokens": 4 * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "out": folder / "sweep.json",
    }
    return SweepSettings(**given | changes)


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory) -> Sweeping:
    return sweep(settings_of(store, tmp_path_factory.mktemp("once")))


def written(result: Sweeping) -> bytes:
    return Path(result["out"]).read_bytes()


def test_every_block_of_the_lengths_has_a_row(swept):
    blocks = ["0:1", "1:2", "2:3", "3:4", "0:2", "1:3", "2:4"]
    assert [row["block"] for row in swept["rows"]] == blocks
    assert swept["trained"] == 7
    for row in swept["rows"]:
        assert row["length"] == int(row["block"][2]) - int(row["block"][0])
        assert all(np.isfinite(row[key]) for key in (*PREDICTORS.values(), "kl", "nmse", "ppl"))
        assert [run["train_tokens"] for run in row["runs"]] == [4 * 4 * CONTEXT]


@pytest.mark.slow
def test_in_two_processes_it_is_the_same_sweep(store, swept, tmp_path):
    """With as many threads for each of them as the one process had."""
    threads = torch.get_num_threads()
    apart = sweep(settings_of(store, tmp_path, workers=2, threads=2 * threads))
    assert apart["rows"] == swept["rows"]
    assert apart["trained"] == 7
    again = sweep(settings_of(store, tmp_path, workers=2, threads=2 * threads, force=True))
    assert again["trained"] == 0
    torch.set_num_threads(threads)


def test_the_files_hold_what_is_returned(swept):
    out = Path(swept["out"])
    content = json.loads(written(swept))
    assert content.pop("digest")
    assert content == {k: v for k, v in swept.items() if k not in ("out", "trained")}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".md").read_text()
    assert "| probe |" in page
    assert "| 2:4 |" in page
    assert {path.name for path in (out.parent / "sweep").iterdir()} == {
        run["run"] for row in swept["rows"] for run in row["runs"]
    }
    console = Console(width=80)
    with console.capture() as shown:
        console.print(summary(swept))
    assert "7 runs trained" in shown.get()
    assert "length 2 (3)" in shown.get()
    assert "…" not in shown.get()


def test_the_predictors_are_those_of_the_map_and_of_the_probe(swept, store):
    found = json.loads((store.parent / "recoupling.json").read_text())
    opened = Store.open(store)
    parts = draw_parts(opened, 16_384, 0)
    for row in swept["rows"]:
        m, n = map(int, row["block"].split(":"))
        for key in ("ratio", "relative_gap", "relative_displacement", "influence"):
            assert row[key] == found[key][m][n]
        assert row["probe_residual"] == probe_residual(opened, (m, n), *parts)


def test_the_scores_are_those_of_evaluate(swept, store, tmp_path):
    row = swept["rows"][-1]
    run = Path(swept["out"]).parent / "sweep" / row["runs"][0]["run"]
    table = evaluate(EvaluateSettings(store=store, runs=(str(run),), out=tmp_path / "results.json"))
    (theirs,) = (each for each in table["rows"] if each["run"])
    for key in ("kl", "nmse", "nmse_without_first", "ppl"):
        assert row[key] == pytest.approx(theirs[key], rel=1e-6)


@pytest.mark.parametrize("length", [None, 1, 2])
@pytest.mark.parametrize("predictor", PREDICTORS.values())
@pytest.mark.parametrize("against", ["kl", "nmse_without_first"])
def test_correlations_match_scipy(swept, predictor, length, against):
    rows = [row for row in swept["rows"] if length in (None, row["length"])]
    (found,) = (
        entry
        for entry in swept["correlations"]
        if (entry["predictor"], entry["length"], entry["against"]) == (predictor, length, against)
    )
    x, y = ([row[key] for row in rows] for key in (predictor, against))
    assert found["points"] == len(rows)
    if len(set(x)) == 1:
        assert found["spearman"] is None
    else:
        assert found["spearman"] == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
        assert found["low"] <= found["high"]


def test_a_choice_is_the_lowest_figure_and_its_place_is_counted_by_kl(swept):
    assert len(swept["choices"]) == 2 * len(PREDICTORS)
    for choice in swept["choices"]:
        rows = [row for row in swept["rows"] if row["length"] == choice["length"]]
        (chosen,) = (row for row in rows if row["block"] == choice["block"])
        assert choice["place"] == 1 + sum(row["kl"] < chosen["kl"] for row in rows)
        assert choice["best_kl"] == min(row["kl"] for row in rows)
        if choice["rank_by"] != "ratio":
            key = PREDICTORS[choice["rank_by"]]
            assert chosen[key] == min(row[key] for row in rows)


def test_a_second_sweep_trains_nothing_and_writes_the_same(swept, store, monkeypatch):
    before = written(swept)
    monkeypatch.setattr("lftpipe.training.several.TrainingRun", None)
    again = sweep(settings_of(store, Path(swept["out"]).parent, force=True))
    assert again["trained"] == 0
    assert written(again) == before


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_the_same(swept, store, tmp_path, monkeypatch):
    real, done = training_step.loss_of, []

    def loss_of(run, batch):
        if len(done) == 10:  # in the middle of the third run
            raise KeyboardInterrupt
        done.append(run.folder.name)
        return real(run, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(training_step, "loss_of", loss_of)
        sweep(settings_of(store, tmp_path))
    assert not (tmp_path / "sweep.json").exists()
    assert len(list(tmp_path.glob("sweep/*/manifest.json"))) == 2
    result = sweep(settings_of(store, tmp_path))
    assert result["trained"] == 5
    theirs, ours = json.loads(written(swept)), json.loads(written(result))
    for each in (theirs, ours):
        each["settings"].pop("out")
        each.pop("digest")
    assert ours == theirs


def test_more_repeats_keep_the_runs_there_are(store, tmp_path):
    short = {"lengths": (2,), "tokens": 4 * CONTEXT}
    first = sweep(settings_of(store, tmp_path, **short))
    both = sweep(settings_of(store, tmp_path, **short, repeats=2, force=True))
    assert (first["trained"], both["trained"]) == (3, 3)
    for row, alone in zip(both["rows"], first["rows"], strict=True):
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["runs"][0] == alone["runs"][0]
        assert row["kl"] == pytest.approx(np.mean([run["kl"] for run in row["runs"]]))


@pytest.mark.parametrize(("objective", "k"), [("fw", 3), ("sfm", 3), ("linear", 1)])
def test_any_objective_can_be_swept(store, tmp_path, objective, k):
    result = sweep(settings_of(store, tmp_path, lengths=(2,), tokens=4 * CONTEXT, objective=objective))
    assert {run["k"] for row in result["rows"] for run in row["runs"]} == {k}
    assert all(objective in run["run"] for row in result["rows"] for run in row["runs"])


def test_the_default_lengths_are_a_quarter_and_a_half(store, tmp_path):
    result = sweep(settings_of(store, tmp_path, lengths=(), tokens=64, objective="linear"))
    assert result["lengths"] == [1, 2]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((2, 5), "--lengths 2,5 / expected: at most 4, the teacher's layers / do: name smaller"),
        ((4,), "--lengths 4, of which there are 1 blocks / expected: at least 3 blocks"),
    ],
)
def test_wrong_lengths_are_refused_before_anything_is_trained(store, tmp_path, lengths, message):
    with pytest.raises(SettingsError, match=message):
        sweep(settings_of(store, tmp_path, lengths=lengths))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        ("1,x", "--lengths 1,x / expected: numbers with commas"),
        ("0,2", "--lengths 0 / expected: at least 1"),
    ],
)
def test_lengths_that_are_no_lengths_are_one_line_errors(store, tmp_path, capsys, lengths, line):
    out = str(tmp_path / "sweep.json")
    with pytest.raises(SystemExit) as exit_:
        cli.app(["sweep", "--store", str(store), "--lengths", lengths, "--out", out], prog_name="lftpipe")
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out) == (1, "")
    assert line in printed.err
    assert printed.err.count("\n") == 1


def test_a_length_without_states_on_the_map_is_refused(store, tmp_path):
    here = tmp_path / "neox" / "states.zarr"
    shutil.copytree(store, here)
    recouple(RecoupleSettings(store=here, tokens=64, batches=2, layers="0,2,4"))
    with pytest.raises(SettingsError, match=r"--lengths 1 / expected: two states .* states 0, 2, 4"):
        sweep(settings_of(here, tmp_path, lengths=(1, 3)))


def test_results_are_not_overwritten_unasked(swept, store):
    before = written(swept)
    with pytest.raises(SettingsError, match=r"sweep.json, which exists .* pass --force"):
        sweep(settings_of(store, Path(swept["out"]).parent))
    assert written(swept) == before
    with pytest.raises(SettingsError, match=r"expected: the JSON file's name"):
        sweep(settings_of(store, Path("x"), out=Path("sweep.md")))


@pytest.mark.slow
def test_runs_of_another_sweep_are_kept_unless_forced(store, tmp_path):
    short = settings_of(store, tmp_path, lengths=(2,), tokens=4 * CONTEXT)
    sweep(short)
    longer = dataclasses.replace(short, tokens=8 * CONTEXT)
    for name in ("json", "md", "png"):
        (tmp_path / f"sweep.{name}").unlink()
    with pytest.raises(RunError, match=r"tokens = 256 for .*0-2-regression-seed0 / expected: tokens = 128"):
        sweep(longer)
    assert sweep(dataclasses.replace(longer, force=True))["trained"] == 3
    (run, *_) = sorted(tmp_path.glob("sweep/*"))
    assert runs.open_run(run).train_tokens == 8 * CONTEXT


def test_the_map_is_made_if_there_is_none(tmp_path, teachers, text_folder):
    store = extracted(tmp_path, teachers["neox"], text_folder, tokens=66 * CONTEXT)
    result = sweep(settings_of(store, tmp_path, lengths=(2,), tokens=4 * CONTEXT))
    made = json.loads((store.parent / "recoupling.json").read_text())
    assert made["settings"]["batches"] == 8 == result["map_settings"]["batches"]


def test_the_map_of_another_store_is_refused(store, tmp_path):
    here = tmp_path / "neox" / "states.zarr"
    shutil.copytree(store, here)
    found = RecouplingMap.from_json(store.parent / "recoupling.json")
    dataclasses.replace(found, store_fingerprint="0").write(here.parent / "recoupling.json")
    with pytest.raises(SettingsError, match=r"made from another .* recouple --force"):
        sweep(settings_of(here, tmp_path))


def test_a_store_without_validation_is_refused(tmp_path, teachers, text_folder):
    store = extracted(tmp_path, teachers["neox"], text_folder, validation_tokens=0)
    with pytest.raises(StoreError, match="without validation sequences"):
        sweep(settings_of(store, tmp_path))


def test_the_picture_draws_every_predictor():
    assert list(PREDICTOR_LABELS) == list(PREDICTORS.values())


def test_a_run_that_stands_for_more_than_its_block_is_not_swept(store, tmp_path):
    with pytest.raises(SettingsError, match="sweep --objective replaceme"):
        sweep(settings_of(store, tmp_path, objective="replaceme"))
