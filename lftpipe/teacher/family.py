"""What lftpipe must know of a family of models, and a layer seen as its residual branches.

A `Family` is derived from the structure of the model (`structure.py`); GPT-NeoX and Llama are written out.
All else works on this interface: docs/families.md says what it asks of a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

#: What a layer is called with beside its states, by name.
Arguments = Mapping[str, Any]


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
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    layer: Callable[[Any, int], nn.Module]
    """`(config, index)` to one layer, as transformers builds it."""
    frame: Callable[[Any], nn.Module]
    """`config` to what `attention_context` asks: a rotary module, or the model around its layers."""
    norm: Callable[[Any], nn.Module]
    """`config` to the final norm."""
    form: Callable[[Any, int], LayerForm | None]
    """`(config, index)` to the layer's branches; None for a layer that is taken as a whole."""
    layers_prefix: str
    """Tensor names of layer `l` start with `<layers_prefix>.<l>.`."""
    embedding_prefix: str
    final_norm_prefix: str
    head_names: tuple[str, ...]
    """Names of the LM head's weight, newest first; tied heads have none and use the embedding."""
    cache_argument: str
    """What a layer and its attention call the KV cache."""
    model_layers: str
    """Path in the base model to the list of layers."""
    model_norm: str
    head: Callable[[Any], nn.Module] | None = None
    """`config` to what makes logits of normed states; None for a linear map without bias."""
    derived: bool = False
    """Whether `structure.py` found all this."""
    without_flow: str | None = None
    """Why the family can be extracted and mapped, but has no flow layers."""

    def parallel_residual(self, config: Any) -> bool:
        """Whether attention and MLP both read the layer's input.

        Parameters
        ----------
        config
            Of the model.
        """
        form = self.form(config, 0)
        return form is not None and form.parallel


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
    layers: Mapping[int, Arguments] | None = None
    """What each layer is called with, where a family is derived; rotary and mask are then in there."""
    again: "Callable[[Tensor], AttentionContext] | None" = None
    """Makes the context of other position ids."""
    apart: bool = False
    """Whether segments must be run one by one, since the layers would not keep them apart."""

    def rows(self, rows: slice) -> "AttentionContext":
        """Of some of the sequences.

        Parameters
        ----------
        rows
            Which of them.
        """
        places = self.position_ids[rows] if len(self.position_ids) > 1 else self.position_ids
        if self.again is not None:
            return self.again(places)
        cos, sin = (part[rows] if len(part) > 1 else part for part in self.rotary)
        mask = self.mask[rows] if self.mask is not None and len(self.mask) > 1 else self.mask
        return AttentionContext((cos, sin), mask, places, self.cache)

    def segments(self) -> "list[tuple[Tensor, slice, AttentionContext]]":
        """Rows, positions and context of each run of equal segments, where they are run one by one."""
        assert self.again is not None, "a context without a frame"
        spans: dict[tuple[int, int], list[int]] = {}
        for row, places in enumerate(self.position_ids):
            starts = (places == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
                spans.setdefault((start, stop), []).append(row)
        parts = []
        for (start, stop), rows in spans.items():
            context = self.again(self.position_ids[rows, start:stop])
            parts.append((torch.tensor(rows, device=self.position_ids.device), slice(start, stop), context))
        return parts


class Branches(nn.Module):
    """One layer as two residual branches, `x + attention(norm(x))`, then or beside it the MLP; or as a whole.

    Parameters
    ----------
    family, config
        Of the teacher.
    index
        Which layer; it matters only to families whose layers differ.
    layer
        The layer itself, where it was built already.
    """

    def __init__(self, family: Family, config: Any, index: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.index = index
        self.layer = family.layer(config, index) if layer is None else layer
        self.form = family.form(config, index)
        self.parallel = self.form is not None and self.form.parallel
        self._cache_argument = family.cache_argument

    @property
    def whole(self) -> bool:
        """Whether the layer has no branches that could be modulated one by one."""
        return self.form is None

    @property
    def attention_norm(self) -> nn.Module:
        return self._norm(self._branch("attention").norm)

    @property
    def mlp_norm(self) -> nn.Module:
        return self._norm(self._branch("mlp").norm)

    @property
    def has_norm_bias(self) -> bool:
        """Whether a shift of the normed states can be folded into the norm."""
        return not self.whole and getattr(self.attention_norm, "bias", None) is not None

    def attention(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The attention branch's output for normed states `x`, as it is added to the stream.

        Parameters
        ----------
        x
            What the norm before the branch gave.
        context
            Positions and mask.
        """
        branch = self._branch("attention")
        module = self.layer.get_submodule(branch.module)
        if context.layers is None:
            cache = {} if context.cache is None else {self._cache_argument: context.cache}
            output = module(x, attention_mask=context.mask, position_embeddings=context.rotary, **cache)[0]
            return self._leave(branch, output)
        if context.apart:
            return _one_by_one(self.attention, x, context)
        return self._leave(branch, _first(module(x, **self._given(branch, context))))

    def mlp(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext | None = None
    ) -> Float[Tensor, "sequence position feature"]:
        """The MLP branch's output for normed states `x`, as it is added to the stream.

        Parameters
        ----------
        x
            What the norm before the branch gave.
        context
            Positions and mask, which some families' MLPs look at.
        """
        branch = self._branch("mlp")
        if context is not None and context.apart:  # RWKV's mixes positions too
            return _one_by_one(self.mlp, x, context)
        given = {} if context is None or not branch.arguments else self._given(branch, context)
        return self._leave(branch, _first(self.layer.get_submodule(branch.module)(x, **given)))

    def forward(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The layer's output, as the teacher computes it.

        Parameters
        ----------
        x
            The states that enter the layer.
        context
            Positions and mask.
        """
        if self.whole:
            if context.apart:
                return _one_by_one(self.forward, x, context)
            assert context.layers is not None, "a whole layer needs its arguments"
            return _first(self.layer(x, **context.layers[self.index]))
        attention = self.attention(self.attention_norm(x), context)
        y = x if self.parallel else x + attention
        return x + attention + self.mlp(self.mlp_norm(y), context)

    def own(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The layer's output by its own forward pass, whose sums are in the teacher's order.

        Parameters
        ----------
        x
            The states that enter the layer.
        context
            Positions and mask.
        """
        if context.layers is not None:
            return _first(self.layer(x, **context.layers[self.index]))
        return _first(
            self.layer(
                x,
                attention_mask=context.mask,
                position_ids=context.position_ids,
                position_embeddings=context.rotary,
            )
        )

    def _branch(self, name: Literal["attention", "mlp"]) -> Branch:
        assert self.form is not None, "a whole layer has no branches"
        return getattr(self.form, name)

    def _norm(self, name: str | None) -> nn.Module:
        return nn.Identity() if name is None else self.layer.get_submodule(name)

    def _given(self, branch: Branch, context: AttentionContext) -> dict[str, Any]:
        assert context.layers is not None
        arguments = context.layers[self.index]
        return {name: arguments[source] for name, source in branch.arguments if source in arguments}

    def _leave(self, branch: Branch, x: Tensor) -> Tensor:
        if branch.post_norm is not None:
            x = self.layer.get_submodule(branch.post_norm)(x)
        return x if branch.scale == 1 else x * branch.scale


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _one_by_one(
    function: Callable[[Tensor, AttentionContext], Tensor], x: Tensor, context: AttentionContext
) -> Tensor:
    """Segment by segment."""
    out = torch.zeros_like(x)
    for rows, positions, part in context.segments():
        out[rows, positions] = function(x[rows, positions], part).to(out.dtype)
    return out


def attention_context(
    frame: nn.Module,
    position_ids: Int[Tensor, "sequence position"],
    dtype: torch.dtype = torch.float32,
    *,
    one_segment: bool | None = None,
) -> AttentionContext:
    """The context of packed sequences, from position ids that restart with each segment.

    Parameters
    ----------
    frame
        What `Family.frame` made: a rotary module, or the model around its layers.
    position_ids
        Of the batch.
    dtype
        Of the rotary embedding.
    one_segment
        Whether every sequence is one segment, for callers that know: to look at a GPU's position ids is to
        wait for them.

    Returns
    -------
    AttentionContext
        Plain causal attention where every sequence is one segment, which has faster kernels; else
        a mask that keeps attention inside the segment.
    """
    if hasattr(frame, "context"):
        return frame.context(position_ids)  # pyright: ignore[reportCallIssue]
    cos_sin = frame(torch.empty(0, dtype=dtype, device=position_ids.device), position_ids)
    starts = position_ids == 0
    if one_segment is None:
        one_segment = not starts[:, 1:].any()
    if one_segment:
        return AttentionContext(cos_sin, None, position_ids)
    segment = starts.cumsum(-1)
    same = segment[:, None, :, None] == segment[:, None, None, :]
    causal = torch.ones(position_ids.shape[1], position_ids.shape[1], dtype=torch.bool, device=same.device)
    return AttentionContext(cos_sin, same & causal.tril(), position_ids)
