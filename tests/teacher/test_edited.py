"""An edited config or tokenizer is refused in one line, whatever type of error a library raises over it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_safety import WORKSPACE, copy_of

from lftpipe.base.errors import LftpipeError, RunError, TeacherError, foreign, reason_of
from lftpipe.commands.generate import generate
from lftpipe.config.settings import GenerateSettings
from lftpipe.teacher.source import load_tokenizer, open_teacher


class PanicException(BaseException):
    """Named as what Rust's libraries raise."""


@pytest.mark.parametrize(
    "raised",
    [
        KeyError("x"),
        TypeError("a\n  b"),
        AttributeError(),
        RecursionError("deep"),
        OSError("odd"),
        PanicException("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_library_raises_becomes_one_line(raised):
    wanted = pytest.raises(RunError, match=r"given: it \(.+\) / expected: that / do: this")
    with wanted as caught, foreign(RunError, "it", "that", "this"):
        raise raised
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), MemoryError(), TeacherError("a", "b", "c"), OSError(28, "No space left on device")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_the_files_fault_is_let_through(raised):
    with pytest.raises(type(raised)) as caught, foreign(RunError, "it", "that", "this"):
        raise raised
    assert caught.value is raised


def test_a_reason_is_short():
    assert len(reason_of(ValueError("a b\n" * 9999))) < 310
    assert reason_of(ValueError(" \n")) == "ValueError"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"},
        {"num_attention_heads": [4]},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**40},
        {"vocab_size": None},
        {"hidden_act": "x" * 300},
        {"hidden_act": None},
        {"layer_norm_eps": "0.1"},
        {"model_type": ["gpt_neox"]},
        {"model_type": {}},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "mystery"}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
        {"quantization_config": [1]},
        {"dtype": "float99"},
        {"architectures": 7},
        {"id2label": [None]},
        {"num_labels": "many"},
        {"attention_bias": [[]]},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_an_edited_config_is_read_or_refused_in_one_line(neox_teacher, tmp_path, change):
    folder = copy_of(neox_teacher, tmp_path / "copy", **change)
    line = ""
    try:
        open_teacher(str(folder), WORKSPACE)
    except LftpipeError as error:
        line = str(error)
    assert not line or re.fullmatch("given: .+ / expected: .+ / do: .+", line)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "32"}, {"hidden_act": "no such"}, {"num_attention_heads": 0}], ids=str
)
def test_an_edited_config_names_the_cure(neox_teacher, tmp_path, change):
    folder = copy_of(neox_teacher, tmp_path / "copy", **change)
    with pytest.raises(TeacherError, match=r"\(.+\) / expected: a config that .* / do: correct config\.json"):
        open_teacher(str(folder), WORKSPACE)


def edited(source: Path, folder: Path, file: str, **change: Any) -> Path:
    shutil.copytree(source, folder)
    place = folder / file
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    return folder


UNUSABLE = [
    ("tokenizer_config.json", {"model_max_length": "many"}),
    ("tokenizer_config.json", {"model_max_length": [1]}),
    ("tokenizer_config.json", {"eos_token": {"content": 3}}),
    ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
    ("tokenizer.json", {"model": None}),
    ("tokenizer.json", {"decoder": {"type": "Mystery"}}),
    ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
]


@pytest.mark.parametrize(("file", "change"), UNUSABLE, ids=str)
def test_an_edited_tokenizer_is_refused_with_the_reason(neox_teacher, tmp_path, file, change):
    folder = edited(neox_teacher.folder, tmp_path / "copy", file, **change)
    with pytest.raises(TeacherError, match=r"usable tokenizer \(.+\)|without an end-of-text token") as caught:
        load_tokenizer(open_teacher(str(folder), WORKSPACE))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_to_write_has_its_tokenizer_tried_too(neox_teacher, tmp_path):
    file, change = UNUSABLE[0]
    folder = edited(neox_teacher.folder, tmp_path / "copy", file, **change)
    with pytest.raises(RunError, match=r"usable tokenizer \(.*model_max_length"):
        generate(GenerateSettings(target=str(folder), prompt="a", max_new_tokens=2))


def test_a_panic_of_the_tokenizers_library_prints_nothing(neox_teacher, tmp_path, capfd):
    decoder = {"type": "WordPiece", "prefix": "", "cleanup": True}
    model = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b", "continuing_subword_prefix": "#"}
    change = {"model": model, "decoder": decoder, "added_tokens": []}
    folder = edited(neox_teacher.folder, tmp_path / "copy", "tokenizer.json", **change)
    with pytest.raises(TeacherError, match="usable tokenizer"):
        load_tokenizer(open_teacher(str(folder), WORKSPACE))
    assert capfd.readouterr().err == ""
