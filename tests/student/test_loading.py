"""What is loaded from a folder is whole and of the right teacher, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_weights
from tiny_students import save_run, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from lftpipe.base.errors import RunError, TeacherError
from lftpipe.student.assemble import load_model, load_teacher, teacher_of_run
from lftpipe.teacher.source import open_teacher

ATOL = 1e-4


@torch.inference_mode()
def test_saved_and_loaded_it_is_the_same(student: Any, tmp_path: Path) -> None:
    student.set_steps(2, "euler")
    student.save_pretrained(tmp_path / "saved")
    assert [file.suffix for file in (tmp_path / "saved").glob("model*")] == [".safetensors"]
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (config.steps, config.solver, config.blocks) == (2, "euler", student.config.blocks)
    ids = tokens(10)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is type(student)
        torch.testing.assert_close(loaded(ids).logits, student(ids).logits, atol=ATOL, rtol=1e-4)


def spoil(folder: Path, how: str) -> None:
    """Damage a saved student's weights."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "gpt_neox.layers.1.velocity.modulation.head.bias"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["gpt_neox.layers.1.velocity.other"] = torch.zeros(2)
    elif how == "misshapen":
        tensors[name] = tensors[name][:-1]
    elif how == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
        file.unlink()
        return
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
        return
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing tensor .*modulation\.head\.bias"),
        ("extra", r"unexpected tensor .*velocity\.other"),
        ("misshapen", r"mismatched tensor .*modulation\.head\.bias"),
        ("pickle", "pickles are never loaded"),
        ("cut", "a model that loads"),
    ],
)
def test_damaged_checkpoints_are_refused(neox_student: Any, tmp_path: Path, how: str, message: str) -> None:
    neox_student.save_pretrained(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(RunError, match=message):
        load_model(tmp_path)


def test_transformers_own_loading_refuses_damage_too(neox_student: Any, tmp_path: Path) -> None:
    neox_student.save_pretrained(tmp_path)
    spoil(tmp_path, "missing")
    with pytest.raises(RunError, match="missing tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    spoil(tmp_path, "pickle")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match="of type t5"):
        load_model(tmp_path)


def test_a_run_whose_teacher_changed_is_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(teachers["neox"], tmp_path / "teacher")
    run = save_run(tmp_path / "run", open_teacher(str(folder), tmp_path), (1, 3))
    assert teacher_of_run(run, tmp_path).num_layers == 4
    shutil.copy(teachers["neox-sequential"] / "model.safetensors", folder / "model.safetensors")
    assert teacher_of_run(run, tmp_path).num_layers == 4  # the same weights
    change_weights(folder)
    with pytest.raises(TeacherError, match="weights changed since"):
        teacher_of_run(run, tmp_path)


def test_a_teacher_that_lacks_a_tensor_is_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(teachers["neox"], tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors") | {"something.else": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_teacher(open_teacher(str(folder), tmp_path)).config.num_hidden_layers == 4
    tensors.pop("gpt_neox.layers.3.mlp.dense_h_to_4h.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"without .*layers\.3\.mlp\.dense_h_to_4h\.weight"):
        open_teacher(str(folder), tmp_path)
