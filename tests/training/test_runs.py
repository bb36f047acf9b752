"""A run's folder holds what its manifest says, or is refused by name, at every command that takes one."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_weights
from safetensors.torch import load_file, save_file
from tiny_students import change_manifest, save_run
from typer.testing import CliRunner

from lftpipe import runs
from lftpipe.base.errors import RunError
from lftpipe.base.files import file_digest, seal
from lftpipe.cli.app import app
from lftpipe.commands.export import export
from lftpipe.config.settings import ExportSettings
from lftpipe.student.assemble import load_model
from lftpipe.teacher.source import Teacher, open_teacher


@pytest.fixture
def run(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    return save_run(tmp_path / "neox" / "runs" / "flow", neox_teacher, (1, 3))


class Bomb:
    """Whoever unpickles it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "a pickle was loaded")


def replace_weights(run: runs.Run, content: bytes | dict[str, torch.Tensor]) -> None:
    """Other weights, to which the manifest's digest is made to fit."""
    file = run.path / runs.WEIGHTS
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    change_manifest(run, weights_digest=file_digest(file))


def test_a_run_is_read_as_it_was_saved(run: runs.Run, neox_teacher: Teacher) -> None:
    flow = runs.load_flow(run, neox_teacher)
    saved = load_file(run.path / runs.WEIGHTS)
    assert flow.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"flow\.safetensors: Missing key.* \"modulation\.head\.bias\""),
        ("extra", r"flow\.safetensors: Unexpected key.* \"modulation\.other\""),
        ("misshapen", r"flow\.safetensors: size mismatch for modulation\.head\.bias"),
        ("cut", r"damaged .*flow\.safetensors / expected: safetensors"),
    ],
)
def test_other_tensors_than_the_flows_are_refused(
    run: runs.Run, neox_teacher: Teacher, how: str, message: str
) -> None:
    tensors: Any = load_file(run.path / runs.WEIGHTS)
    if how == "missing":
        del tensors["modulation.head.bias"]
    elif how == "extra":
        tensors["modulation.other"] = torch.zeros(2)
    elif how == "misshapen":
        tensors["modulation.head.bias"] = tensors["modulation.head.bias"][:-1].clone()
    else:
        tensors = (run.path / runs.WEIGHTS).read_bytes()[:-7]
    replace_weights(run, tensors)
    with pytest.raises(RunError, match=message):
        runs.load_flow(runs.open_run(run.path), neox_teacher)


def test_weights_that_the_manifest_does_not_know_are_refused(run: runs.Run) -> None:
    content = bytearray((run.path / runs.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (run.path / runs.WEIGHTS).write_bytes(content)
    with pytest.raises(RunError, match="expected: the weights that the manifest was written for"):
        runs.open_run(run.path)


def test_a_pickle_in_place_of_a_runs_weights_is_never_loaded(
    run: runs.Run, neox_teacher: Teacher, tmp_path: Path
) -> None:
    replace_weights(run, pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(RunError, match=r"damaged .*flow\.safetensors / expected: safetensors"):
        runs.load_flow(runs.open_run(run.path), neox_teacher)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("form", ["plain", "latent-flow"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"without safetensors / expected: .*pickles are never loaded"),
        ("model.safetensors", "expected: a model that loads"),
    ],
)
def test_a_pickle_in_place_of_an_exports_weights_is_never_loaded(
    run: runs.Run, tmp_path: Path, form: Any, name: str, message: str
) -> None:
    out = tmp_path / "out"
    export(ExportSettings(workspace=tmp_path, runs=("flow",), solver="euler", form=form, out=out))
    (out / "model.safetensors").unlink()
    (out / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(RunError, match=message):
        load_model(out)
    assert not (tmp_path / "trace").exists()


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("how", ["missing", "extra"])
@pytest.mark.parametrize("form", ["plain", "latent-flow"])
def test_an_export_with_other_tensors_is_refused(run: runs.Run, tmp_path: Path, form: Any, how: str) -> None:
    out = tmp_path / "out"
    export(ExportSettings(workspace=tmp_path, runs=("flow",), solver="euler", form=form, out=out))
    tensors = load_file(out / "model.safetensors")
    if how == "missing":
        del tensors["gpt_neox.final_layer_norm.bias"]
    else:
        tensors["gpt_neox.final_layer_norm.other"] = torch.zeros(2)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    kind, name = ("missing", "bias") if how == "missing" else ("unexpected", "other")
    with pytest.raises(RunError, match=rf"{kind} tensor gpt_neox\.final_layer_norm\.{name}"):
        load_model(out)


def commands(target: str) -> dict[str, list[str]]:
    """Every command that opens a run of this name."""
    return {
        "export": ["export", target],
        "generate": ["generate", target, "--prompt", "the state"],
        "draft": ["generate", "--draft", target, "--prompt", "the state"],
    }


@pytest.mark.parametrize("command", commands(""))
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no run")
    arguments = [*commands(str(tmp_path / "folder"))[command], "--workspace", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: given: {tmp_path / 'folder'} / expected: a finished run with a readable manifest.json / "
        "do: train it again\n"
    )


@pytest.mark.parametrize("command", commands(""))
def test_a_run_whose_teacher_changed_is_refused_in_one_line(
    teachers: dict[str, Path], tmp_path: Path, command: str
) -> None:
    folder = shutil.copytree(teachers["neox"], tmp_path / "teacher")
    run = save_run(tmp_path / "x" / "runs" / "flow", open_teacher(str(folder), tmp_path), (1, 3))
    change_weights(folder)
    done = CliRunner().invoke(app, [*commands("flow")[command], "--workspace", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"error: given: teacher {folder} whose weights changed since {run.path} was"
    )


@pytest.mark.parametrize("command", [*commands(""), "evaluate"])
def test_no_steps_are_refused_in_one_line(run: runs.Run, tmp_path: Path, command: str) -> None:
    arguments = (commands("flow") | {"evaluate": ["evaluate", "flow"]})[command]
    done = CliRunner().invoke(app, [*arguments, "--workspace", str(tmp_path), "--k", "0"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: given: --k 0 / expected: at least 1 / do: raise --k\n"


def test_a_damaged_manifest_is_refused(run: runs.Run) -> None:
    manifest = json.loads((run.path / runs.MANIFEST).read_text())
    del manifest["parts"]
    del manifest["digest"]
    (run.path / runs.MANIFEST).write_text(json.dumps(seal(manifest)))
    with pytest.raises(RunError, match=r"a finished run with a readable manifest\.json"):
        runs.open_run(run.path)
