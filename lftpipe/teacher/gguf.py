"""A `.gguf` file as a folder in transformers' format."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lftpipe.base.errors import TeacherError, foreign
from lftpipe.teacher.silence import quiet_transformers


def convert(gguf: Path, folder: Path, accept: Callable[[Any, str], object]) -> Path:
    """A `.gguf` file as a folder in transformers' format, made once and kept beside the experiment.

    Later stages read single layers of the teacher from there.

    `accept`: called with the config and the file's name before any weight is read; raises what it does not
    accept.
    Raises `TeacherError` if the file is damaged, or of a model that is not accepted.
    """
    with gguf.open("rb") as content:
        # Commands that begin at the same time wait for the one that converts.
        with suppress(OSError):  # some network file systems lock no file that is open for reading alone
            fcntl.flock(content, fcntl.LOCK_EX)
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or a damaged one
            if json.loads((folder / "source.json").read_text())["sha256"] == digest:
                return folder
        return _convert(gguf, folder, digest, accept)


def _convert(gguf: Path, folder: Path, digest: str, accept: Callable[[Any, str], object]) -> Path:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    where = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "trust_remote_code": False,
    }
    reads = "a GGUF file that transformers reads", "fetch it again"
    with foreign(TeacherError, f"{gguf}", *reads), quiet_transformers():
        try:
            _refuse_parts(gguf)
            config = AutoConfig.from_pretrained(**where)
            accept(config, str(gguf))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except ImportError as error:
            raise TeacherError(
                f"{gguf}", "the packages gguf and accelerate", "pip install 'lftpipe[gguf]'"
            ) from error
    model, report = loaded
    if missing := sorted(map(str, report["missing_keys"])):  # transformers draws them at random
        raise TeacherError(
            f"{gguf} without the tensor {missing[0]}", "all tensors of its model", "fetch it again"
        )
    partial.mkdir(parents=True)
    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "model.safetensors")
    model.generation_config.save_pretrained(partial)
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "source.json").write_text(json.dumps({"file": gguf.name, "sha256": digest}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _refuse_parts(gguf: Path) -> None:
    """Refuse one file of several that make a model: transformers would take it for the whole."""
    from gguf import GGUFReader

    count = GGUFReader(gguf).get_field("split.count")
    if count is not None and (parts := int(count.contents())) > 1:
        raise TeacherError(
            f"{gguf}, one of {parts} parts of a model",
            "a model in one file",
            "join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
