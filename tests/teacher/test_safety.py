"""What a checkpoint may say of itself, and what it is not believed."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lftpipe
from lftpipe.base.errors import TeacherError
from lftpipe.student.assemble import load_model
from lftpipe.teacher import gguf
from lftpipe.teacher.checkpoint import Checkpoint
from lftpipe.teacher.source import Teacher, open_recorded, open_teacher, record_of

WORKSPACE = Path("unused")

GGUF = Path(str(gguf.__file__))


def load_teacher_of(folder: Path) -> None:
    open_teacher(str(folder), WORKSPACE)


def copy_of(teacher: Teacher, folder: Path, **config: Any) -> Path:
    """A teacher's folder with some of its config changed."""
    shutil.copytree(teacher.folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def index_of(folder: Path, file: str) -> None:
    names = {"weight_map": {"a": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors"]
)
def test_an_index_leads_to_safetensors_of_its_folder_alone(tmp_path, file):
    index_of(tmp_path, file)
    with pytest.raises(TeacherError, match="expected: safetensors files of the same folder"):
        Checkpoint(tmp_path)


def test_a_folder_has_one_source_of_weights(neox_teacher, tmp_path):
    folder = copy_of(neox_teacher, tmp_path / "copy")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    index_of(folder, "other.safetensors")
    with pytest.raises(TeacherError, match=r"an index of other files / expected: one source of weights"):
        open_teacher(str(folder), WORKSPACE)
    index_of(folder, "model.safetensors")
    assert open_teacher(str(folder), WORKSPACE).checkpoint.digest == neox_teacher.checkpoint.digest


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 10**6},
        {"vocab_size": 10**9},
        {"num_hidden_layers": 10**6},
        {"intermediate_size": 10**7},
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_before_anything_of_its_size_is_made(
    neox_teacher, tmp_path, config, monkeypatch
):
    folder = copy_of(neox_teacher, tmp_path / "copy", **config)
    made = lambda weight, *_: weight if weight.is_meta else pytest.fail("weights were made")  # noqa: E731
    monkeypatch.setattr(torch.nn.init, "normal_", made)
    with pytest.raises(TeacherError, match=r"config\.json and weights of other models|as config\.json says"):
        open_teacher(str(folder), WORKSPACE)


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer"])
def test_a_recorded_teacher_is_the_same_in_every_part(neox_teacher, tmp_path, part):
    folder = copy_of(neox_teacher, tmp_path / "copy")
    teacher = open_teacher(str(folder), WORKSPACE)
    record = record_of({"teacher": teacher.identity(), "tokenizer_digest": teacher.tokenizer_digest})
    assert open_recorded(record, WORKSPACE, tmp_path).identity() == teacher.identity()
    file = {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[part]
    content = bytearray((folder / file).read_bytes())
    if part == "weights":
        content[-2:] = bytes(2)
    else:
        content += b" "  # JSON of the same meaning
    (folder / file).write_bytes(bytes(content))
    with pytest.raises(TeacherError, match=f"whose {part} changed since"):
        open_recorded(record, WORKSPACE, tmp_path)


@pytest.mark.slow
def test_a_tokenizer_with_code_neither_asks_nor_runs(neox_teacher, tmp_path):
    """In a process of its own, where `y` waits on standard input."""
    folder = copy_of(neox_teacher, tmp_path / "code")
    file = folder / "tokenizer_config.json"
    mapped = {"tokenizer_class": "Mystery", "auto_map": {"AutoTokenizer": ["mystery.Mystery", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | mapped))
    (folder / "mystery.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mystery: pass\n")
    code = "import sys; from lftpipe.cli.app import main; sys.argv[0] = 'lftpipe'; main()"
    command = [sys.executable, "-c", code, "generate", str(folder), "--prompt", "a", "--max-new-tokens", "2"]
    done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr


def calls_of_transformers() -> dict[str, set[str]]:
    """The keywords of every call of transformers' automatic classes, by where it is."""
    found = {}
    for path in sorted(Path(lftpipe.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                    place = f"{path.name}:{node.lineno} {name}"
                    found[place] = {ast.unparse(keyword) for keyword in node.keywords}
    return found


def test_every_call_of_transformers_trusts_no_code_and_no_pickle():
    calls = calls_of_transformers()
    assert len(calls) >= 7
    for place, keywords in calls.items():
        if "**where" in keywords:  # of a GGUF file
            assert place.startswith("gguf.py")
            assert '"trust_remote_code": False' in GGUF.read_text()
            continue
        assert "trust_remote_code=False" in keywords, place
        if "Model" in place and "from_pretrained" in place:
            assert "use_safetensors=True" in keywords, place


@pytest.mark.parametrize("load", [load_model, load_teacher_of], ids=["student", "teacher"])
def test_an_index_that_leads_elsewhere_is_refused_however_a_model_is_loaded(neox_teacher, tmp_path, load):
    folder = copy_of(neox_teacher, tmp_path / "copy")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index_of(folder, "../outside.safetensors")
    (folder / "inside.safetensors").touch()
    with pytest.raises(TeacherError, match="expected: safetensors files of the same folder"):
        load(folder)
