"""Layers with fewer channels in their MLP: which linear maps that concerns, and how they shrink."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe.base.errors import TeacherError
from lftpipe.base.shape import channels_of
from lftpipe.families.branches import Branches
from lftpipe.families.layer_probe import is_linear_map, is_transposed, weight_of

#: Names by which an MLP may keep the number of its channels.
_COUNTS = ("intermediate_size", "ffn_dim", "hidden_dim", "inner_dim")


@dataclass(frozen=True)
class MlpMaps:
    """The linear maps of an MLP by their names in the layer."""

    inputs: tuple[str, ...]
    """From states to channels: one, or two with a gate; a fused one gives gate and value side by side."""
    output: str
    """From channels to states."""
    channels: int


def mlp_maps(layer: Branches) -> MlpMaps:
    """The maps around the channels of a layer's MLP.

    Raises `TeacherError` if the MLP has other parts with weights, or the layer has no MLP of its own.
    """
    branch = None if layer.form is None else layer.form.mlp
    maps = _maps_of(layer, branch.module, branch.output) if branch and branch.output else None
    if maps is None:
        raise TeacherError(
            f"--width for layer {layer.index}, whose MLP is more than linear maps around its channels",
            "a plain or gated MLP",
            "leave --width out",
        )
    return maps


def _maps_of(layer: Branches, module: str, output: str) -> MlpMaps | None:
    parts = {f"{module}.{name}": part for name, part in layer.layer.get_submodule(module).named_modules()}
    channels = weight_of(parts[output]).shape[1]
    weighted = [name for name, part in parts.items() if list(part.parameters(recurse=False))]
    inputs = tuple(name for name in weighted if name != output)
    sizes = [len(weight_of(parts[name])) for name in inputs if is_linear_map(parts[name])]
    plain = len(sizes) == len(inputs) and sizes in ([channels], [channels] * 2, [2 * channels])
    return MlpMaps(inputs, output, channels) if plain else None


def narrow(layer: Branches, width: float, keep: Tensor | None = None) -> Branches:
    """Give a layer's MLP fewer channels, in place.

    Raises `TeacherError` if the MLP is not made of linear maps alone.
    """
    if width == 1:
        return layer
    maps = mlp_maps(layer)
    count = channels_of(width, maps.channels)
    for name in (*maps.inputs, maps.output):
        old: Any = layer.layer.get_submodule(name)
        ways = 1 if name == maps.output else len(weight_of(old)) // maps.channels
        wanted = None if keep is None else torch.cat([keep + way * maps.channels for way in range(ways)])
        layer.layer.set_submodule(name, _shrunk(old, ways * count, wanted, of_input=name == maps.output))
    module: Any = layer.layer.get_submodule(maps.output.rpartition(".")[0])
    for name in _COUNTS:
        if getattr(module, name, None) == maps.channels:
            setattr(module, name, count)
    return layer


def _shrunk(old: Any, count: int, keep: Tensor | None, *, of_input: bool) -> nn.Module:
    """A linear map with `count` inputs, or outputs, of those that `old` has."""
    outputs, inputs = weight_of(old).shape
    inputs, outputs = (count, outputs) if of_input else (inputs, count)
    place: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    if is_transposed(old):
        with torch.device(old.weight.device):
            new: Any = type(old)(outputs, inputs).to(old.weight.dtype)
    else:
        new = nn.Linear(inputs, outputs, bias=old.bias is not None, **place)
    if keep is not None:
        with torch.no_grad():
            weight_of(new).copy_(weight_of(old)[:, keep] if of_input else weight_of(old)[keep])
            if old.bias is not None:
                new.bias.copy_(old.bias if of_input else old.bias[keep])
    return new.requires_grad_(old.weight.requires_grad)
