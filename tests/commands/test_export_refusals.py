"""What an export refuses, what it may replace, and what it never touches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import export_settings as settings
from tiny_students import save_run

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.commands.export import export
from lftpipe.student.assemble import load_model
from lftpipe.teacher.source import Teacher, open_teacher


@pytest.fixture
def neox_run(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    return save_run(tmp_path / "neox" / "runs" / "flow", neox_teacher, (1, 3), solver="euler")


def test_nothing_is_overwritten_without_force(neox_run: runs.Run, tmp_path: Path) -> None:
    export(settings(neox_run, tmp_path, k=1))
    with pytest.raises(RunError, match="which is there already"):
        export(settings(neox_run, tmp_path, k=2))
    export(settings(neox_run, tmp_path, k=2, force=True))
    assert load_model(tmp_path / "out").config.steps == 2
    assert not list(tmp_path.glob("out.*"))


def test_force_spares_folders_that_are_no_exports(neox_run: runs.Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="no exported model"):
        export(settings(neox_run, tmp_path, force=True))
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_what_is_beside_an_export_is_not_touched(neox_run: runs.Run, tmp_path: Path) -> None:
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    export(settings(neox_run, tmp_path, k=1))
    export(settings(neox_run, tmp_path, k=2, force=True))
    assert {entry.name for entry in tmp_path.iterdir()} == {"neox", "out", "out.old", "out.partial"}
    assert (tmp_path / "out.old/mine.txt").exists()
    assert (tmp_path / "out.partial/mine.txt").exists()


def test_force_spares_files_that_were_put_into_an_export(neox_run: runs.Run, tmp_path: Path) -> None:
    export(settings(neox_run, tmp_path, k=1))
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"notes\.md, which is not part of what `lftpipe export` writes"):
        export(settings(neox_run, tmp_path, k=2, force=True))
    assert load_model(tmp_path / "out").config.steps == 1


def test_force_spares_the_teacher_even_one_that_was_exported(
    neox_run: runs.Run, neox_teacher: Teacher, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="the student's own teacher"):
        export(settings(neox_run, tmp_path, force=True, out=Path(neox_teacher.model)))
    assert open_teacher(neox_teacher.model, tmp_path).checkpoint.digest == neox_teacher.checkpoint.digest


def test_a_failed_export_leaves_the_old_one(
    neox_run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(settings(neox_run, tmp_path, k=1))

    def full(_teacher: Teacher) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lftpipe.commands.export.load_tokenizer", full)
    with pytest.raises(OSError, match="no space"):
        export(settings(neox_run, tmp_path, k=2, force=True))
    assert load_model(tmp_path / "out").config.steps == 1
    monkeypatch.undo()
    export(settings(neox_run, tmp_path, k=2, force=True))
    assert not (tmp_path / "out.partial").exists()


def test_a_student_with_weights_that_are_not_finite_is_refused(neox_teacher: Teacher, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", neox_teacher, (1, 3), solver="euler")
    flow = runs.load_flow(run, neox_teacher)
    with torch.no_grad():
        next(flow.parameters()).view(-1)[0] = torch.nan
    kept = ("teacher", "block", "objective", "solver", "walk_steps", "seed", "train_tokens", "parts", "shape")
    manifest = {key: getattr(run, key) for key in (*kept, "store_fingerprint")}
    manifest["parts"] = [part.to_json() for part in run.parts]
    runs.save_run(run.path, flow, manifest)
    with pytest.raises(RunError, match="which is not finite"):
        export(settings(run, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("block", [0, 3]), ("solver", "midpoint"), ("seed", 9)])
def test_an_edited_manifest_is_refused(neox_run: runs.Run, tmp_path: Path, key: str, value: Any) -> None:
    file = neox_run.path / runs.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(RunError, match=r"manifest\.json: its digest does not match .* readable manifest"):
        export(settings(neox_run, tmp_path))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"runs": ()}, SettingsError, "without a run"),
        ({"runs": ("nothing",)}, RunError, "no run nothing"),
        ({"runs": ("no/thing",)}, RunError, "a finished run"),
        ({"k": 0}, SettingsError, "--k 0"),
    ],
)
def test_exports_that_make_no_sense_are_refused(neox_run, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        export(settings(neox_run, tmp_path, **options))
