"""Students and teachers as transformers models: loaded by run, folder or name, and put together."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lftpipe import runs
from lftpipe.base.errors import RunError, TeacherError, foreign
from lftpipe.base.shape import Part
from lftpipe.base.workspace import find_run
from lftpipe.families import attention
from lftpipe.families.meta_model import materialise_buffers
from lftpipe.families.structure import per_layer_lists, structure_of
from lftpipe.flow.part import PartSequence
from lftpipe.results.run import SOURCE, ExportSource
from lftpipe.runs import Run
from lftpipe.student.config import PREFIX
from lftpipe.student.derived import student_class
from lftpipe.student.flow_layer import number_layer
from lftpipe.teacher.checkpoint import Checkpoint
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher, load_tokenizer, open_recorded, open_teacher, tokenizer_of

# --- Models and teachers from folders: a student, a plain export, a whole teacher; the teacher of a run.


def teacher_of_run(run: Run, workspace: Path) -> Teacher:
    """The teacher that a run was trained for.

    Raises `TeacherError` if it is not found, or its weights are no longer those.
    """
    return open_recorded(dict(run.teacher), workspace, run.path)


def teacher_of_folder(folder: Path, workspace: Path) -> Teacher:
    """The teacher of an exported folder.

    Raises `RunError` if the folder was not exported by lftpipe.
    Raises `TeacherError` if the teacher is not found, or its weights changed since.
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

    Raises `RunError` if it is no such folder, of a type lftpipe does not know, holds pickles only, or a
    tensor is missing, extra or misshapen.
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


# --- Students from their parts: a teacher's checkpoint and the runs that replace its blocks.


def build_student(
    teacher: Teacher, opened: Sequence[Run], *, steps: int | None = None, solver: str | None = None
) -> Any:
    """The teacher with the blocks of these runs replaced, in float32.

    `steps`, `solver`: left out, those that the runs were trained with.
    Raises `RunError` if the runs are of different teachers, disagree on what is left out, lack a tensor, or
    one was healed in another student.
    """
    opened = sorted(opened, key=lambda run: run.block)
    for run in opened:
        if run.teacher["weights_digest"] != teacher.checkpoint.digest:
            raise RunError(
                f"{run.path}, of another teacher", "runs of one teacher", "name runs of one teacher"
            )
    runs.refuse_healed(opened)
    teacher = runs.healed_teacher(opened, teacher)
    timed = [run for run in opened if run.has_time]
    if not timed and ((steps or 1) > 1 or (solver or "euler") != "euler"):
        raise RunError(
            f"{opened[0].path} in {steps or 1} {solver or 'euler'} steps",
            "k = 1 with euler: it was trained without time",
            "leave out --k and --solver, or name a run of a flow",
        )
    if steps is None:
        steps = _agreed(timed, "walk_steps", "--k", 1)
    if solver is None:
        solver = _agreed(timed, "solver", "--solver", "euler")
    flows = [flow for run in opened for flow in _modules(run, teacher)]
    kind = student_class(teacher.config.model_type)
    plain = teacher.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "num_hidden_layers", "dtype"):
        plain.pop(key, None)
    config = kind.config_class(
        **plain,
        teacher_layers=teacher.num_layers,
        teacher_lists=per_layer_lists(teacher.config),
        blocks=[part.to_json() for run in opened for part in run.parts],
        solver=solver,
        steps=steps,
    )
    config._attn_implementation = attention_of(teacher)
    with torch.device("meta"):
        student = kind(config)
    tensors = _tensors(student, teacher, iter(flows))
    return fill(student, tensors, generation_config(teacher))


def attention_of(teacher: Teacher) -> str:
    """The implementation of attention that whole models run with: torch's own where the family knows it."""
    implementation = structure_of(teacher.config).implementation
    return "sdpa" if implementation == attention.NAME else implementation


def fill(model: Any, tensors: Mapping[str, Tensor], generation_config: GenerationConfig) -> Any:
    """Give a model made on the meta device its weights, and what else it needs to run.

    `tensors`: weights by name; those that are tied may be left out.
    """
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    materialise_buffers(model, model)  # rotary frequencies are no weights
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    assert not empty, empty
    model.generation_config = generation_config
    return model.eval().requires_grad_(False)


def without_layers(model: Any, teacher: Teacher, blocks: Sequence[tuple[int, int]]) -> Any:
    """The teacher with the layers of these blocks left out: the draft to beat. It shares all tensors."""
    skipped = {layer for m, n in blocks for layer in range(m, n)}
    layers_left = [layer for layer in range(teacher.num_layers) if layer not in skipped]
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    draft = copy.deepcopy(model, shared)  # modules of its own, whatever kinds they are of
    layers: Any = draft.base_model.get_submodule(teacher.family.model_layers)
    draft.base_model.set_submodule(
        teacher.family.model_layers, nn.ModuleList(layers[layer] for layer in layers_left)
    )
    for index, layer in enumerate(layers_left):
        number_layer(layers[layer], index)
    draft.config.num_hidden_layers = len(layers_left)
    for name, values in per_layer_lists(teacher.config).items():
        setattr(draft.config, name, [values[layer] for layer in layers_left])
    return draft


def _modules(run: Run, teacher: Teacher) -> list[nn.Module]:
    """What replaces layers in a run, part by part, without what is nothing."""
    flow = runs.load_flow(run, teacher)
    modules = flow.parts if isinstance(flow, PartSequence) else [flow]
    return [module for part, module in zip(run.parts, modules, strict=True) if part.kind != "skip"]


def _agreed(timed: list[Run], field: str, option: str, otherwise: Any) -> Any:
    values = {getattr(run, field) for run in timed}
    if len(values) > 1:
        raise RunError(
            f"runs trained with {field} {' and '.join(map(str, sorted(values)))}",
            "one for the whole student",
            f"say which with {option}",
        )
    return values.pop() if values else otherwise


def _tensors(student: Any, teacher: Teacher, flows: Any) -> dict[str, Tensor]:
    """The student's tensors by its own names, from the checkpoint and from the flows."""
    family = teacher.family
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # of the checkpoint, by the student's
    places = student.config.places()
    for name in student.state_dict().keys() - student.all_tied_weights_keys.keys():
        match = re.fullmatch(rf"{re.escape(family.layers_prefix)}\.(\d+)\.(.+)", name)
        if match is None:
            names[name] = name
        elif isinstance(place := places[int(match[1])], int):
            names[name] = f"{family.layers_prefix}.{place}.{match[2]}"
    read = teacher.checkpoint.read(sorted(set(names.values())))
    tensors = {name: read[source] for name, source in names.items()}
    for index, place in enumerate(places):
        if isinstance(place, Part):
            flow: nn.Module = next(flows)
            prefix = f"{family.layers_prefix}.{index}.velocity."
            tensors |= {prefix + name: value for name, value in flow.state_dict().items()}
    return tensors


def generation_config(teacher: Teacher) -> GenerationConfig:
    """How a model writes where nothing else is asked: what the teacher's folder says, or its config."""
    if (teacher.folder / "generation_config.json").is_file():
        wanted = "a generation_config.json that transformers reads", "correct or remove it"
        with foreign(TeacherError, f"{teacher.folder}", *wanted):
            return GenerationConfig.from_pretrained(teacher.folder)
    return GenerationConfig.from_model_config(teacher.config)


# --- Any language model that a user names: a run's student, an exported folder, or a teacher.


class LanguageModel(NamedTuple):
    """A model in float32, its tokenizer, and how it is called."""

    name: str
    model: Any
    tokenizer: Any


def language_model(name: str, workspace: Path, store: Path | None = None) -> LanguageModel:
    """A model by name.

    Raises `LftpipeError` if there is no run, folder or teacher of the name, or it is damaged.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return LanguageModel(name, load_model(folder), tokenizer_of(folder, RunError, "export it again"))
    if _is_run(name, workspace, store):
        run = runs.open_run(find_run(workspace, store, name))
        teacher = teacher_of_run(run, workspace)
        return LanguageModel(name, build_student(teacher, [run]), load_tokenizer(teacher))
    teacher = open_teacher(name, workspace)
    return LanguageModel(name, load_teacher(teacher), load_tokenizer(teacher))


def beside(name: str, workspace: Path, store: Path | None = None) -> list[LanguageModel]:
    """For a run: its teacher, and the teacher without the layers of its blocks; for another model nothing."""
    if not _is_run(name, workspace, store):
        return []
    run = runs.open_run(find_run(workspace, store, name))
    teacher = teacher_of_run(run, workspace)
    model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
    skipping = without_layers(model, teacher, run.shortened)
    return [LanguageModel(teacher.name, model, tokenizer), LanguageModel("skip", skipping, tokenizer)]


def _is_run(name: str, workspace: Path, store: Path | None) -> bool:
    try:
        return (find_run(workspace, store, name) / runs.MANIFEST).is_file()
    except RunError:
        return False
