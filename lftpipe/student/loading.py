"""Models and teachers from folders: a student, a plain export, a whole teacher; the teacher of a run."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lftpipe.base.errors import RunError, foreign
from lftpipe.results.run import SOURCE, ExportSource
from lftpipe.runs import Run
from lftpipe.student.assemble import attention_of, fill, generation_config
from lftpipe.student.config import PREFIX
from lftpipe.student.derived import student_class
from lftpipe.teacher.checkpoint import Checkpoint
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher, open_recorded


def teacher_of_run(run: Run, workspace: Path) -> Teacher:
    """The teacher that a run was trained for.

    Raises
    ------
    TeacherError
        If it is not found, or its weights are no longer those.
    """
    return open_recorded(dict(run.teacher), workspace, run.path)


def teacher_of_folder(folder: Path, workspace: Path) -> Teacher:
    """The teacher of an exported folder.

    Raises
    ------
    RunError
        If the folder was not exported by lftpipe.
    TeacherError
        If the teacher is not found, or its weights changed since.
    """
    try:
        source = ExportSource.of_folder(folder)
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} without {SOURCE}, which names its teacher",
            "an exported folder, or a run",
            "name one of these",
        ) from error
    return open_recorded(dict(source.teacher), workspace, folder)


def load_teacher(teacher: Teacher) -> Any:
    """The whole teacher as a language model, in float32, of the weights of its own folder alone."""
    config = copy.deepcopy(teacher.config)
    config._attn_implementation = attention_of(teacher)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind(config)
    names = [name for name in model.state_dict() if name not in model.all_tied_weights_keys]
    return fill(model, teacher.checkpoint.read(names), generation_config(teacher))


def load_model(folder: Path) -> Any:
    """A model from a folder in transformers' format: a student, a plain export, a teacher.

    Raises
    ------
    RunError
        If it is no such folder, of a type lftpipe does not know, holds pickles only, or a tensor is missing,
        extra or misshapen.
    """
    if not (folder / "config.json").is_file():
        raise RunError(
            f"{folder}", "a run, or a folder with config.json and model.safetensors", "check the path"
        )
    return _load(folder)


def _register(folder: Path) -> None:
    """Make the student's classes that a folder needs known to transformers."""
    config = json.loads((folder / "config.json").read_text())
    kind = str(config.get("model_type", ""))
    if kind.startswith(PREFIX):
        student_class(kind.removeprefix(PREFIX))


def _load(folder: Path) -> Any:
    if not list(folder.glob("*.safetensors")):
        raise RunError(
            f"{folder} without safetensors", "model.safetensors (pickles are never loaded)", "export it again"
        )
    Checkpoint(folder)  # refuses an index that leads elsewhere, and two sources
    with foreign(RunError, f"{folder}", "a model that loads", "export it again"), quiet_transformers():
        _register(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise RunError(
                f"{folder} of type {config.model_type}",
                "a causal language model that transformers has, or a student",
                "name another folder",
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
            trust_remote_code=False,
        )
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        for name in sorted(map(str, report[f"{kind}_keys"])):
            raise RunError(f"{folder}: {kind} tensor {name}", "the model's tensors", "export it again")
    return model.eval().requires_grad_(False)
