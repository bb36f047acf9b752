"""`lftpipe runs` and `lftpipe compare`: what is listed, what differs, and what cannot be read."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_data import results
from rich.console import Console
from tiny_students import save_run

from lftpipe import runs as run_folders
from lftpipe.base.errors import LftpipeError, RunError, SettingsError
from lftpipe.commands import compare as compare_stage
from lftpipe.commands import runs as runs_stage
from lftpipe.commands.compare import compare
from lftpipe.commands.runs import runs
from lftpipe.config.settings import CompareSettings, RunsSettings

SETTINGS = {"block": "1:3", "objective": "fw", "solver": "midpoint", "seed": 0, "learning_rate": 0.02}


@pytest.fixture
def workspace(neox_teacher, tmp_path: Path) -> Path:
    """Two finished runs, scored, one that is being trained, and one that diverged."""
    here, weights = tmp_path / "tiny" / "runs", {}
    for seed in (0, 1):
        run = save_run(here / f"walk-seed{seed}", neox_teacher, (1, 3), seed=seed)
        weights[run.path.name] = run.weights_digest
        run_folders.write_settings(run.path, SETTINGS | {"seed": seed, "run": run.path.name}, "0" * 32)
    for name in ("begun", "lost"):
        run_folders.write_settings(here / name, SETTINGS | {"objective": "sfm"}, "0" * 32)
    (here / "begun/metrics.jsonl").write_text('{"step": 20, "tokens": 640, "loss": 1.0}\n')
    run_folders.note_divergence(here / "lost", 3, 0.5)
    table = results()
    rows = [dataclasses.replace(row, weights_digest=weights.get(row.run or "")) for row in table.rows]
    dataclasses.replace(table, rows=rows).write(tmp_path / "tiny" / "results.json")
    return tmp_path


def text_of(summary: Any, width: int = 200) -> str:
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(summary)
    return captured.get()


def test_every_run_is_listed_with_its_best_score(workspace: Path) -> None:
    rows = {row["run"]: row for row in runs(RunsSettings(workspace=workspace))["rows"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "walk-seed0": "finished",
        "walk-seed1": "finished",
        "begun": "unfinished",
        "lost": "diverged",
    }
    walk = rows["walk-seed0"]
    assert (walk["block"], walk["objective"], walk["train_tokens"]) == ("1:3", "fw", 1000)
    assert (walk["kl"], walk["k"], walk["nfe"]) == (pytest.approx(0.1), 3, 6)  # of k = 1 and 3 the better
    assert (rows["begun"]["train_tokens"], rows["begun"]["kl"]) == (640, None)
    assert list(rows)[:2] == ["walk-seed0", "walk-seed1"]  # the lowest KL first


def test_a_run_that_was_trained_again_has_no_score_of_its_former_weights(workspace: Path) -> None:
    table = results()
    rows = [dataclasses.replace(row, weights_digest="of before" if row.run else None) for row in table.rows]
    dataclasses.replace(table, rows=rows).write(workspace / "tiny" / "results.json")
    found = runs(RunsSettings(workspace=workspace))
    assert {row["kl"] for row in found["rows"]} == {None}
    assert "2 not evaluated" in text_of(runs_stage.summary(found))


def test_a_damaged_run_is_a_line_of_the_table(workspace: Path) -> None:
    (workspace / "tiny/runs/walk-seed0/manifest.json").write_text("{")
    (workspace / "tiny/runs/begun/settings.toml").write_text("[")
    found = runs(RunsSettings(workspace=workspace))
    damaged = {row["run"] for row in found["rows"] if row["state"] == "damaged"}
    assert damaged == {"walk-seed0", "begun"}


def test_a_narrow_terminal_keeps_run_block_and_divergence(workspace: Path) -> None:
    shown = text_of(runs_stage.summary(runs(RunsSettings(workspace=workspace))), width=90)
    assert "walk-seed0" in shown
    assert "1:3" in shown
    assert "0.1" in shown
    assert "4 runs, 2 finished" in shown
    assert "--json has all" in shown


def test_a_workspace_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"without runs .* `lftpipe train"):
        runs(RunsSettings(workspace=tmp_path))


def test_only_what_differs_is_compared(workspace: Path) -> None:
    found = compare(CompareSettings(workspace=workspace, runs=("walk-seed0", "walk-seed1")))
    assert found["settings"] == {"seed": [0, 1]}
    assert found["same_settings"] == len(SETTINGS) - 1
    assert found["made_from"] == {}
    assert found["results"]["kl"] == [pytest.approx(0.1), pytest.approx(0.12)]
    shown = text_of(compare_stage.summary(found))
    assert "seed" in shown
    assert "4 settings are the same" in shown
    assert "0.12" in shown
    assert json.loads(json.dumps(found.to_json())) == dict(found)


def test_runs_that_were_not_evaluated_are_compared_by_their_settings(workspace: Path) -> None:
    (workspace / "tiny/results.json").unlink()
    found = compare(CompareSettings(workspace=workspace, runs=("walk-seed0", "walk-seed1")))
    assert found["results"] == {}
    assert "no results: `lftpipe evaluate`" in text_of(compare_stage.summary(found))


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (("walk-seed0",), SettingsError, "1 runs to compare"),
        (("walk-seed0", "begun"), RunError, "begun / expected: a finished run"),
        (("walk-seed0", "nowhere"), RunError, "no run nowhere"),
    ],
)
def test_anything_but_two_finished_runs_is_refused(
    workspace: Path, names: tuple[str, ...], kind: type[LftpipeError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        compare(CompareSettings(workspace=workspace, runs=names))


@pytest.mark.parametrize("arguments", [["runs"], ["compare", "walk-seed0", "walk-seed1"]])
def test_the_commands_load_no_torch(workspace: Path, arguments: list[str]) -> None:
    code = "import sys; from lftpipe.cli.app import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    words = [*arguments, "--workspace", str(workspace)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "walk-seed1" in done.stdout
