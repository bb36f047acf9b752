"""The teacher as lftpipe reads it, against the model as transformers loads it from the same folder."""

import copy
from typing import Any

import torch
from torch import Tensor

from lftpipe.base.errors import TeacherError, foreign
from lftpipe.families.structure import per_layer_lists
from lftpipe.teacher.capture import TRIED, close
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher, config_of
from lftpipe.teacher.tail import Tail
from lftpipe.teacher.trunk import Trunk


def check_logits(teacher: Teacher) -> None:
    """Refuse a teacher whose first states or logits are not those of the model that transformers loads.

    Of its layers only the first is loaded, where the family can be cut to one: embedding and head are what
    configs and files say different things of. Families without flow layers have no head of their own here.

    Raises `TeacherError` naming what differs; or if transformers loads no model.
    """
    trunk = Trunk(teacher, 1, torch.float32)
    tail = None if teacher.family.without_flow else Tail(teacher, teacher.num_layers)
    differs = _differs(trunk, tail, _cut(teacher))
    if differs:  # or the family is another one with fewer layers
        wanted = "weights that transformers loads", "fetch or save the model again"
        with foreign(TeacherError, f"model {teacher.model}", *wanted):
            differs = _differs(trunk, tail, _loaded(teacher, config_of(teacher.folder, teacher.model)))
    if differs:
        raise TeacherError(
            f"model {teacher.model}, {differs} of which are read as others than transformers computes",
            "weights that belong to config.json",
            "save the model again with save_pretrained; nothing was written",
        )


def _cut(teacher: Teacher) -> Any:
    """The model with its first layer alone; None where the family makes no such model."""
    config = config_of(teacher.folder, teacher.model)
    for name, values in per_layer_lists(config).items():
        setattr(config, name, values[:1])
    config.num_hidden_layers = 1
    try:
        return _loaded(teacher, config)
    except Exception:  # of the model's own constructor
        return None


def _loaded(teacher: Teacher, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = None
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            teacher.folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()


@torch.inference_mode()
def _differs(trunk: Trunk, tail: Tail | None, model: Any) -> str:
    """What of a model is not what trunk and tail compute; nothing if all is."""
    if model is None:
        return "states"
    places = torch.arange(TRIED)[None]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(trunk.teacher.config.vocab_size, (1, TRIED), generator=generator)
    ours: dict[int, Tensor] = {}
    trunk.run(tokens, places, hidden=lambda index, state: ours.update({index: state.clone()}))
    theirs: list[Tensor] = []
    layers = model.get_submodule(trunk.teacher.family.layers_prefix)

    def entering(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        theirs.append((given[0] if given else named["hidden_states"]).clone())

    def leaving(_: Any, __: Any, output: Any) -> None:
        theirs.append(output[0] if isinstance(output, tuple) else output)

    layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    for layer in {layers[0], layers[-1]}:
        layer.register_forward_hook(leaving)
    logits = model(tokens, use_cache=False).logits
    if not all(close(ours[index], theirs[index]) for index in (0, 1)):
        return "states"
    return "" if tail is None or close(tail.logits(theirs[-1]), logits, 1e-3) else "logits"
