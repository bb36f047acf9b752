"""Embedding and head: one rule, transformers' own, whatever config.json and the files say of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_weights, extracted
from decoders import make_decoders
from safetensors.torch import load_file, save_file
from teachers import WORKSPACE, whole
from tiny_students import save_run, tokens

from lftpipe.base.errors import TeacherError
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.student.plain import unroll
from lftpipe.teacher import compare
from lftpipe.teacher.compare import check_logits
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail, count_parameters
from lftpipe.teacher.trunk import Trunk

FAMILIES = ("llama", "qwen2", "gpt_neox")
HEADS = {"llama": "lm_head.weight", "qwen2": "lm_head.weight", "gpt_neox": "embed_out.weight"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A tied teacher of each family."""
    from decoders import DECODERS

    ties = {name: {"tie_word_embeddings": True} for name in FAMILIES}
    with pytest.MonkeyPatch.context() as patch:
        for name, change in ties.items():
            patch.setitem(DECODERS, name, change)
        return make_decoders(tmp_path_factory.mktemp("heads"), FAMILIES, tokenizer)


def edited(folder: Path, to: Path, head: str, *, tied: bool) -> Path:
    """A copy whose config says `tied`, and whose file has another head, the head's name alone, or none."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (to / "config.json").write_text(json.dumps(config))
    tensors = load_file(to / "model.safetensors")
    [embedding] = [
        name for name in tensors if "embed" in name and name.endswith("weight") and "out" not in name
    ]
    name = HEADS[config["model_type"]]
    if head == "another":
        generator = torch.Generator().manual_seed(1)
        tensors[name] = torch.randn(tensors[embedding].shape, generator=generator)
    elif head == "alone":
        tensors[name] = tensors.pop(embedding)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@torch.inference_mode()
def logits_of(teacher: Teacher, tmp_path: Path) -> dict[str, torch.Tensor]:
    """By whatever of ours makes logits: trunk and tail, the loaded teacher, a student, its plain export."""
    ids, places = tokens(12), torch.arange(12)[None]
    last: dict[int, torch.Tensor] = {}
    Trunk(teacher, 4, torch.float32).run(
        ids, places, hidden=lambda index, state: last.update({index: state.clone()})
    )
    run = save_run(tmp_path / "run", teacher, (1, 2), part={"kind": "skip", "shift": False})
    student = build_student(teacher, [run])
    assert (unroll(student)(ids).logits - student(ids).logits).abs().max() < 1e-4
    return {
        "tail": Tail(teacher, 4).logits(last[4]),
        "teacher": load_teacher(teacher)(ids).logits,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "tied"), [("same", True), ("another", True), ("another", False), ("alone", True)]
)
@torch.inference_mode()
def test_tied_in_the_config_or_not_logits_are_those_of_transformers(
    folders: dict[str, Path], tmp_path: Path, family: str, head: str, tied: bool
) -> None:
    folder = edited(folders[family], tmp_path / "teacher", head, tied=tied)
    teacher = open_teacher(str(folder), WORKSPACE)
    theirs = whole(teacher)
    for name, ours in logits_of(teacher, tmp_path).items():
        torch.testing.assert_close(ours, theirs(tokens(12)).logits, rtol=1e-3, atol=1e-4, msg=name)
    check_logits(teacher)
    assert count_parameters(teacher) == sum(each.numel() for each in theirs.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_without_a_head_in_the_file_is_refused_before_the_store_is_claimed(
    folders: dict[str, Path], tmp_path: Path, text_folder: Path, family: str
) -> None:
    folder = edited(folders[family], tmp_path / "teacher", "none", tied=False)
    with pytest.raises(TeacherError, match=r"without lm_head\.weight / expected: all tensors"):
        extracted(tmp_path / "workspace", folder, text_folder)
    assert not list(tmp_path.glob("workspace/**/states.zarr"))


def test_logits_that_are_not_the_models_own_are_refused_before_the_store_is_claimed(
    teachers: dict[str, Path], tmp_path: Path, text_folder: Path, monkeypatch: Any
) -> None:
    folder = shutil.copytree(teachers["neox"], tmp_path / "teacher")
    other = shutil.copytree(teachers["neox"], tmp_path / "other")
    change_weights(other)
    loaded = compare._loaded

    def elsewhere(teacher: Teacher, config: Any) -> Any:
        return loaded(open_teacher(str(other), WORKSPACE), config)

    monkeypatch.setattr(compare, "_loaded", elsewhere)
    with pytest.raises(TeacherError, match=r"states of which are read as others than transformers computes"):
        extracted(tmp_path / "workspace", folder, text_folder)
    assert not list(tmp_path.glob("workspace/**/states.zarr"))
