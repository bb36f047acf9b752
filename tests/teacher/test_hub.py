"""A model of the Hub: known by its commit, and errors that say what to do."""

import errno
import importlib
import os
import shutil
from typing import Any

import pytest
from teachers import WORKSPACE

from lftpipe.base.errors import TeacherError
from lftpipe.teacher.source import HUB_FILES, OTHER_FORMATS, open_teacher

# The Hub, with its client faked


@pytest.fixture
def hub(monkeypatch):
    """Put an answer in the place of the Hub's."""
    import huggingface_hub

    def install(answer):
        calls = []

        def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns):
            calls.append((hub_id, revision))
            assert not any("bin" in pattern for pattern in allow_patterns)
            if isinstance(answer, BaseException):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return install


@pytest.mark.parametrize("model", ["pythia-410m", "EleutherAI/pythia-410m"])
def test_a_hub_model_is_known_by_its_commit(hub, neox_teacher, tmp_path, model):
    shutil.copytree(neox_teacher.folder, tmp_path / "0123abcd")
    calls = hub(tmp_path / "0123abcd")
    teacher = open_teacher(model, WORKSPACE, revision="step1000")
    assert calls == [("EleutherAI/pythia-410m", "step1000")]
    assert (teacher.revision, teacher.model) == ("0123abcd", model)
    assert teacher.name == model.replace("/", "--")
    assert teacher.corpus == ("pile" if model == "pythia-410m" else None)


def test_what_makes_a_model_usable_is_fetched_and_nothing_in_another_format():
    from huggingface_hub.utils import filter_repo_objects

    usable = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "qwen.tiktoken",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ]
    others = [
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx",
        "onnx/config.json",
        "openvino/tokenizer.json",
        "pytorch_model.bin",
        "model.gguf",
    ]
    kept = filter_repo_objects(usable + others, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS)
    assert list(kept) == usable


class NetworkError(Exception):
    """Of a client library that derives its errors from nothing in particular."""


def hub_errors() -> dict[str, tuple[Exception, str]]:
    errors: Any = importlib.import_module("huggingface_hub.errors")
    response = errors.Response(
        404, request=errors.Response.__init__.__globals__["Request"]("GET", "https://hub")
    )
    return {
        "offline": (
            errors.LocalEntryNotFoundError("no network"),
            "expected: the Hugging Face Hub within reach",
        ),
        "timeout": (NetworkError("late"), r"machine \(late\) / expected: the Hugging Face Hub within reach"),
        "proxy": (
            ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
            r"\(Using SOCKS proxy, but the 'socksio' package is not installed.\) .* check its proxies",
        ),
        "refused": (ConnectionError("refused"), "expected: the Hugging Face Hub within reach"),
        "missing": (
            errors.RepositoryNotFoundError("?", response=response),
            "expected: a public model on the Hugging",
        ),
        "revision": (
            errors.RevisionNotFoundError("?", response=response),
            "revision step7 .* / do: check --revision",
        ),
        "name": (errors.HFValidationError("?"), "expected: a public model on the Hugging Face Hub"),
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EMFILE])
def test_what_this_machine_lacks_is_not_blamed_on_the_hub(hub, number):
    hub(OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)):
        open_teacher("org/model", WORKSPACE)


@pytest.mark.parametrize("case", hub_errors())
def test_a_hub_that_cannot_answer_is_one_line_with_the_cure(hub, case):
    error, message = hub_errors()[case]
    hub(error)
    with pytest.raises(TeacherError, match=message):
        open_teacher("org/model", WORKSPACE, revision="step7")
