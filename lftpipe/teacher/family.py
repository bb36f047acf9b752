"""What lftpipe must know of a family of models, and a layer seen as its two branches.

A family is one small file that fills in a `Family`. Everything else works on that interface:
see docs/families.md for how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Names by which one family's checkpoints and modules go in transformers."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    layer: Callable[[Any, int], nn.Module]
    """`(config, index)` to one layer, as transformers builds it."""
    rotary: Callable[[Any], nn.Module]
    """`config` to the module that maps `(x, position_ids)` to the rotary `(cos, sin)`."""
    norm: Callable[[Any], nn.Module]
    """`config` to the final norm."""
    parallel_residual: Callable[[Any], bool]
    """Whether attention and MLP both read the layer's input."""
    layers_prefix: str
    """Tensor names of layer `l` start with `<layers_prefix>.<l>.`."""
    embedding_prefix: str
    final_norm_prefix: str
    head_names: tuple[str, ...]
    """Names of the LM head's weight, newest first; tied heads have none and use the embedding."""
    attention_norm: str
    """Attributes of a layer: the norm before attention, attention, the norm before the MLP, the MLP."""
    attention: str
    mlp_norm: str
    mlp: str
    attention_output: str
    """The linear map that ends the attention branch; `mlp_output` ends the MLP's. Exports fold gates in."""
    mlp_output: str
    cache_argument: str
    """What a layer and its attention call the KV cache."""
    model_layers: str
    """Attribute of the base model that holds the list of layers."""
    model_norm: str


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs to know of a batch beside its states: positions and who sees whom."""

    rotary: tuple[Tensor, Tensor]
    mask: Shaped[Tensor, "#sequence 1 position key"] | None
    """True where a query (third axis) sees a key (last axis), or what to add to the scores; None is
    plain causal attention."""
    position_ids: Int[Tensor, "#sequence position"]
    cache: Any = None
    """Where attention keeps keys and values of earlier positions, when generating."""

    def rows(self, rows: slice) -> "AttentionContext":
        """Of some of the sequences."""
        cos, sin = (part[rows] if len(part) > 1 else part for part in self.rotary)
        mask = self.mask[rows] if self.mask is not None and len(self.mask) > 1 else self.mask
        places = self.position_ids[rows] if len(self.position_ids) > 1 else self.position_ids
        return AttentionContext((cos, sin), mask, places, self.cache)


class Branches(nn.Module):
    """One layer as two residual branches: `x + attention(norm(x))`, then or beside it the MLP.

    Parameters
    ----------
    family, config
        Of the teacher.
    index
        Which layer; it matters only to families whose layers differ.
    """

    def __init__(self, family: Family, config: Any, index: int) -> None:
        super().__init__()
        self.layer = family.layer(config, index)
        self.parallel = family.parallel_residual(config)
        self._cache_argument = family.cache_argument
        self._attributes = (family.attention_norm, family.attention, family.mlp_norm, family.mlp)

    @property
    def attention_norm(self) -> nn.Module:
        return getattr(self.layer, self._attributes[0])

    @property
    def mlp_norm(self) -> nn.Module:
        return getattr(self.layer, self._attributes[2])

    @property
    def has_norm_bias(self) -> bool:
        """Whether a shift of the normed states can be folded into the norm."""
        return getattr(self.attention_norm, "bias", None) is not None

    def attention(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The attention branch's output for normed states `x`."""
        module = getattr(self.layer, self._attributes[1])
        cache = {} if context.cache is None else {self._cache_argument: context.cache}
        return module(x, attention_mask=context.mask, position_embeddings=context.rotary, **cache)[0]

    def mlp(
        self, x: Float[Tensor, "sequence position feature"]
    ) -> Float[Tensor, "sequence position feature"]:
        """The MLP branch's output for normed states `x`."""
        return getattr(self.layer, self._attributes[3])(x)

    def forward(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The layer's output, as the teacher computes it."""
        attention = self.attention(self.attention_norm(x), context)
        y = x if self.parallel else x + attention
        return x + attention + self.mlp(self.mlp_norm(y))


def attention_context(
    rotary: nn.Module, position_ids: Int[Tensor, "sequence position"], dtype: torch.dtype = torch.float32
) -> AttentionContext:
    """The context of packed sequences, from position ids that restart with each piece.

    Plain causal attention where every sequence is one piece, which has faster kernels; else a
    mask that keeps attention inside the piece.
    """
    cos_sin = rotary(torch.empty(0, dtype=dtype, device=position_ids.device), position_ids)
    starts = position_ids == 0
    if not starts[:, 1:].any():
        return AttentionContext(cos_sin, None, position_ids)
    piece = starts.cumsum(-1)
    same = piece[:, None, :, None] == piece[:, None, None, :]
    causal = torch.ones(position_ids.shape[1], position_ids.shape[1], dtype=torch.bool, device=same.device)
    return AttentionContext(cos_sin, same & causal.tril(), position_ids)
