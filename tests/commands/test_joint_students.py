"""Runs that were trained jointly: however one of them is named, it is its whole student, once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from training_runs import short_run

from lftpipe import load_student, runs
from lftpipe.base.errors import LftpipeError, RunError, SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, HealSettings
from lftpipe.reporting.collect import collect
from lftpipe.reporting.runs import best_score, line_of
from lftpipe.results.scores import Results

A, B = "run-0-1", "run-2-3"


@pytest.fixture(scope="module")
def trained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store, and a folder of an experiment with two runs of one student."""
    folder = tmp_path_factory.mktemp("joint") / "runs"
    train(short_run(stores["neox"], folder, objective="fw", solver="euler", block="0:1,2:3", joint=True))
    return stores["neox"], folder


@pytest.fixture
def folder(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the runs, for one test."""
    return shutil.copytree(trained[1], tmp_path / "runs")


def scored(store: Path, folder: Path, *named: Path, **values: Any) -> list[str]:
    given = {"store": store, "runs": tuple(map(str, named)), "k": (1,), "out": folder.parent / "results.json"}
    return [
        row["run"] for row in evaluate(EvaluateSettings(**given | values, force=True))["rows"] if row["run"]
    ]


def test_a_run_that_is_named_in_several_ways_is_still_one(
    trained: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = trained[0].resolve()
    (folder / "latest").symlink_to(folder / B, target_is_directory=True)
    monkeypatch.chdir(folder / A)
    both = f"{A} + {B}"
    assert scored(store, folder, folder / "latest", Path("..") / A) == [both]
    result = export(ExportSettings(runs=("./.", str(folder / B)), out=folder / "out"))
    assert result["blocks"] == ["0:1", "2:3"]


def test_an_unfinished_run_of_a_student_is_said(trained: tuple[Path, Path], folder: Path) -> None:
    (folder / A / runs.MANIFEST).unlink()
    for refused in (lambda: load_student(folder / B), lambda: scored(trained[0], folder, folder / B)):
        with pytest.raises(RunError, match=f"unfinished run .*{A}"):
            refused()


def test_runs_of_other_trainings_are_no_student(trained: tuple[Path, Path], folder: Path) -> None:
    other = short_run(
        trained[0],
        folder.parent / "other",
        objective="fw",
        solver="euler",
        block="0:1,2:3",
        joint=True,
        seed=1,
    )
    train(other)
    shutil.rmtree(folder / B)
    shutil.copytree(folder.parent / "other" / B, folder / B)
    assert [run.path.name for run in runs.open_student(folder / A)] == [A]


def test_the_report_and_the_list_show_a_student_by_all_its_runs(
    trained: tuple[Path, Path], folder: Path
) -> None:
    scored(trained[0], folder, folder / A, together=True)
    found = collect(folder.parent)
    assert set(found.curves) == {A, B}
    (command,) = [line for line in found.commands if " train " in line]
    assert "--block 0:1 --block 2:3" in command
    rows = Results.from_json(folder.parent / "results.json").rows
    whole = next(row for row in rows if row.run == f"{A} + {B}")
    assert [best_score(folder / name) for name in (A, B)] == [whole] * 2
    assert {line_of(folder / name).kl for name in (A, B)} == {whole.kl}


def test_steps_that_tokens_choose_are_not_asked_of_a_joint_student(
    trained: tuple[Path, Path], folder: Path
) -> None:
    with pytest.raises(SettingsError, match="that is a student by itself"):
        scored(trained[0], folder, folder / A, k=(2,), adaptive=(0.1,))


@pytest.mark.parametrize(
    ("block", "refused"), [("0:1,2:4", None), ("0:2,2:4", "--train tail for block 0:2,2:4 of 4 layers")]
)
def test_a_joint_student_has_a_tail_where_a_layer_lies_after_any_block(
    stores: dict[str, Path], tmp_path: Path, block: str, refused: str | None
) -> None:
    store = stores["neox"]
    made = train(short_run(store, tmp_path, objective="regression", block=block, joint=True))["runs"]
    given = HealSettings(
        store=store,
        target=made[0]["run"],
        run=str(tmp_path / "h"),
        loss="tokens",
        tokens=CONTEXT,
        adapter="full",
    )
    if refused is None:
        assert len(heal(given)["joint"]) == 2
    else:
        with pytest.raises(LftpipeError, match=refused):
            heal(given)


def test_runs_that_were_healed_apart_are_not_taken_for_a_healed_student(
    trained: tuple[Path, Path], folder: Path
) -> None:
    given = HealSettings(
        store=trained[0], target=str(folder / A), run=str(folder / "h"), loss="tokens", tokens=CONTEXT
    )
    heal(given)
    for name in ("h-0-1", "h-2-3"):
        file = folder / name / runs.MANIFEST
        manifest = {key: value for key, value in json.loads(file.read_text()).items() if key != "digest"}
        from lftpipe.base.files import seal

        file.write_text(json.dumps(seal(manifest | {"joint": None, "student": None})))
    with pytest.raises(RunError, match="no student of it"):
        heal(given)
