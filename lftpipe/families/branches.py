"""A layer of any family, seen as its residual branches: norm, attention, norm, MLP."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.families.attention import AttentionContext
from lftpipe.families.family import Branch, Family


class Branches(nn.Module):
    """One layer as two residual branches, `x + attention(norm(x))`, then or beside it the MLP; or as a whole.

    `index`: which layer; it matters only to families whose layers differ.
    """

    def __init__(self, family: Family, config: Any, index: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.index = index
        self.layer = family.layer(config, index) if layer is None else layer
        self.form = family.form(config, index)
        self.parallel = self.form is not None and self.form.parallel

    @property
    def whole(self) -> bool:
        """Whether the layer has no branches that could be modulated one by one."""
        return self.form is None

    @property
    def attention_norm(self) -> nn.Module:
        """Before the attention branch."""
        return self._norm(self._branch("attention").norm)

    @property
    def mlp_norm(self) -> nn.Module:
        """Before the MLP branch."""
        return self._norm(self._branch("mlp").norm)

    @property
    def has_norm_bias(self) -> bool:
        """Whether shifts of the normed states can be folded into both norms."""
        norms = [] if self.whole else [self.attention_norm, self.mlp_norm]
        return bool(norms) and all(getattr(norm, "bias", None) is not None for norm in norms)

    def attention(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The attention branch's output for normed states `x`, as it is added to the stream."""
        branch = self._branch("attention")
        module = self.layer.get_submodule(branch.module)
        if context.apart:
            return _one_by_one(self.attention, x, context)
        return self._leave(branch, _first(module(x, **self._given(branch, context))))

    def mlp(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext | None = None
    ) -> Float[Tensor, "sequence position feature"]:
        """The MLP branch's output for normed states `x`, as it is added to the stream."""
        branch = self._branch("mlp")
        if context is not None and context.apart:  # RWKV's mixes positions too
            return _one_by_one(self.mlp, x, context)
        given = {} if context is None or not branch.arguments else self._given(branch, context)
        return self._leave(branch, _first(self.layer.get_submodule(branch.module)(x, **given)))

    def forward(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The layer's output, as the teacher computes it."""
        if self.whole:
            if context.apart:
                return _one_by_one(self.forward, x, context)
            return _first(self.layer(x, **context.layers[self.index]))
        attention = self.attention(self.attention_norm(x), context)
        y = x if self.parallel else x + attention
        return x + attention + self.mlp(self.mlp_norm(y), context)

    def own(
        self, x: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The layer's output by its own forward pass, whose sums are in the teacher's order."""
        return _first(self.layer(x, **context.layers[self.index]))

    def _branch(self, name: Literal["attention", "mlp"]) -> Branch:
        assert self.form is not None, "a whole layer has no branches"
        return getattr(self.form, name)

    def _norm(self, name: str | None) -> nn.Module:
        return nn.Identity() if name is None else self.layer.get_submodule(name)

    def _given(self, branch: Branch, context: AttentionContext) -> dict[str, Any]:
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
