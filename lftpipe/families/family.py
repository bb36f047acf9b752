"""What lftpipe must know of a family of models: where its parts are, and the form of its layers.

A `Family` is derived from the structure of the model (`structure.py`). All else works on this interface:
docs/families.md says what it asks of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Branch:
    """One residual branch: `post_norm(module(norm(x))) * scale`, by the layer's attributes."""

    module: str
    norm: str | None = None
    """None: the module reads the residual stream as it is."""
    post_norm: str | None = None
    """The norm that the module's output passes before it is added, if any."""
    output: str | None = None
    """The linear map that ends the module, seen from the layer. Exports fold the gate into it."""
    scale: float = 1.0
    arguments: tuple[tuple[str, str], ...] = ()
    """Keywords of the module, each with the layer's keyword that it comes from."""


@dataclass(frozen=True)
class LayerForm:
    """A layer of two residual branches."""

    attention: Branch
    mlp: Branch
    parallel: bool = False
    """Whether both branches read the layer's input."""
    is_attention: bool = True
    """False: the first branch mixes positions in another way."""


@dataclass(frozen=True)
class Family:
    """One family's modules in transformers, and the names of its tensors in a checkpoint."""

    name: str
    layer: Callable[[Any, int], nn.Module]
    """`(config, index)` to one layer, as transformers builds it."""
    frame: Callable[[Any], nn.Module]
    """`config` to what `attention_context` asks: the model around its layers."""
    norm: Callable[[Any], nn.Module]
    """`config` to the final norm."""
    form: Callable[[Any, int], LayerForm | None]
    """`(config, index)` to the layer's branches; None for a layer that is taken as a whole."""
    layers_prefix: str
    """Tensor names of layer `l` start with `<layers_prefix>.<l>.`."""
    final_norm_prefix: str
    cache_argument: str
    """What a layer and its attention call the KV cache."""
    model_layers: str
    """Path in the base model to the list of layers."""
    model_norm: str
    head: Callable[[Any], nn.Module]
    """`config` to what makes logits of normed states."""
    without_flow: str | None = None
    """Why the family can be extracted and mapped, but has no flow layers."""

    def parallel_residual(self, config: Any) -> bool:
        """Whether attention and MLP both read the layer's input."""
        form = self.form(config, 0)
        return form is not None and form.parallel
