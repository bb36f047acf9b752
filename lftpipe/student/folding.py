"""What a velocity's modulation does to a branch, folded into the tensors of an ordinary layer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe.teacher.branches import Branches
from lftpipe.teacher.family import Branch
from lftpipe.teacher.maps import is_transposed, weight_of

Tensors = dict[str, Tensor]


def obstacle(layer: Branches) -> str | None:
    """Why a layer's modulation folds into no ordinary layer; None if it does."""
    form = layer.form
    if form is None:
        return "a layer that is modulated as a whole, not in its branches"
    if form.attention.norm is not None and form.attention.norm == form.mlp.norm:
        return "two branches behind one norm, each with a scale of its own"
    for name, branch in (("attention", form.attention), ("MLP", form.mlp)):
        if branch.post_norm is None and branch.output is None:
            return f"an {name} that ends in no linear map, which a gate would fold into"
        if not _has_weight(layer.layer, branch.norm) and not _inputs(layer.layer, branch):
            return f"an {name} that begins neither with a norm's weight nor with linear maps"
        if branch.post_norm is not None and not _has_weight(layer.layer, branch.post_norm):
            return f"an {name} whose output passes a norm without weight"
    return None


def fold_branch(
    step: Tensors, layer: nn.Module, branch: Branch, scale: Tensor, gate: Tensor, shift: Tensor | None
) -> None:
    """`gate * branch((1 + scale) * norm(x) + shift)` as tensors of an ordinary layer."""
    if _has_weight(layer, branch.norm):
        _scale_norm(step, layer, str(branch.norm), 1 + scale, shift)
    else:
        for name in _inputs(layer, branch):
            step[f"{name}.weight"] = (1 + scale)[None, :] * step[f"{name}.weight"]
    if branch.post_norm is not None:
        _scale_norm(step, layer, branch.post_norm, gate, None)
        return
    name = str(branch.output)
    rows = gate[None, :] if is_transposed(layer.get_submodule(name)) else gate[:, None]
    step[f"{name}.weight"] = rows * step[f"{name}.weight"]
    if (bias := step.get(f"{name}.bias")) is not None:
        step[f"{name}.bias"] = gate * bias


def _scale_norm(step: Tensors, layer: nn.Module, name: str, factor: Tensor, shift: Tensor | None) -> None:
    """`factor * norm(x) + shift`; some norms keep their weight less one."""
    offset = _offset(layer.get_submodule(name))
    weight = step[f"{name}.weight"]
    step[f"{name}.weight"] = factor * (weight + offset) - offset if offset else factor * weight
    if (bias := step.get(f"{name}.bias")) is not None:
        step[f"{name}.bias"] = factor * bias + (0 if shift is None else shift)


def _has_weight(layer: nn.Module, name: str | None) -> bool:
    return name is not None and getattr(layer.get_submodule(name), "weight", None) is not None


@torch.no_grad()
def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, else 0."""
    bare: Any = copy.deepcopy(norm)
    for parameter in bare.parameters():
        parameter.zero_()
    rising = torch.arange(1.0, 1 + bare.weight.shape[-1], device=bare.weight.device)[None]
    return 0.0 if bool((bare(rising) == 0).all()) else 1.0


def _inputs(layer: nn.Module, branch: Branch) -> list[str]:
    """Linear maps of a branch's module that read its input."""
    if branch.output is None:
        return []
    module = layer.get_submodule(branch.module)
    width = len(weight_of(layer.get_submodule(branch.output)))
    names = [
        f"{branch.module}.{name}"
        for name, part in module.named_children()
        if isinstance(part, nn.Linear) and part.in_features == width
    ]
    return [name for name in names if name != branch.output]
