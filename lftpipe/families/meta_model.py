"""A model without weights: what transformers builds on the meta device, and where its layers are.

The structure of every derived family is read from it, and single parts are taken out of it.
"""

import copy
from typing import Any

import torch
from torch import nn

from lftpipe.base.errors import TeacherError
from lftpipe.families import attention

#: Implementations of attention, the fastest first; a model takes the first that it knows.
IMPLEMENTATIONS = (attention.NAME, "sdpa", "eager")


#: Values of a buffer that is made from the config alone.
LARGEST_BUFFER = 2**28


def build(config: Any, implementation: str = attention.NAME, device: str = "meta") -> Any:
    """The language model of a config, as transformers builds it, without weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    config.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def layers_path(model: Any) -> str:
    """The path in a language model to its list of layers.

    The layer's class is the one that the model itself records hidden states of (`_can_record_outputs`);
    where it names none, the layers are the longest list of modules of `num_hidden_layers`.
    """
    count = model.config.num_hidden_layers
    kinds = _recorded_kinds(model)
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count or not count:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if not kinds or all(isinstance(layer, kinds) for layer in module):
            found.append(name)
    if len(found) != 1:
        raise TeacherError(
            f"a {model.config.model_type} model with {len(found)} lists of {count} layers",
            "one list of decoder layers that the residual stream runs through",
            "choose another model",
        )
    return found[0]


def takes_any_attention(model: Any) -> bool:
    """Whether torch's own attention computes all that this model's does: no sinks, soft-caps or biases."""
    parts = [part for part in model.modules() if hasattr(part, "_supports_sdpa")]
    return all(part._supports_sdpa for part in parts) and not any(
        getattr(model.config, name, None) for name in ("attn_logit_softcapping", "attn_logit_softcap")
    )


def _recorded_kinds(model: Any) -> tuple[type, ...]:
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states")
        if recorded is not None:
            each = recorded if isinstance(recorded, list | tuple) else [recorded]
            return tuple(getattr(kind, "target_class", None) or kind for kind in each)
    return ()


def materialise_buffers(root: Any, module: nn.Module) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, say) their values.

    transformers computes them in `_init_weights`, since it too builds models on the meta device.

    `root`: the model that the module was taken out of, which knows how to initialise it.
    """
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for part in module.modules():
        empty = {name: each for name, each in part._buffers.items() if each is not None and each.is_meta}
        for name, buffer in empty.items():
            if buffer.numel() > LARGEST_BUFFER:
                raise TeacherError(
                    f"a {root.config.model_type} model with a buffer of {buffer.numel():,} values",
                    f"at most {LARGEST_BUFFER:,}",
                    "correct config.json: its positions are too many",
                )
            part._buffers[name] = torch.zeros_like(buffer, device="cpu")
        if empty:
            with torch.random.fork_rng(devices=[]):
                root._init_weights(part)
