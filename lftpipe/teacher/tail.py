"""What follows a block: the teacher's last layers, final norm and head; how many parameters it all has."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from lftpipe.families.attention import AttentionContext
from lftpipe.families.structure import Logits
from lftpipe.teacher.layers import empty_layer, fill, load_layer, load_norm
from lftpipe.teacher.source import Teacher

# --- Several of the teacher's layers in a row: from a state to the logits, or between two blocks.


class Tail(nn.Module):
    """The frozen end of the teacher: layers `start .. L-1`, final norm and LM head."""

    def __init__(self, teacher: Teacher, start: int) -> None:
        super().__init__()
        self.start, self.vocabulary = start, teacher.config.vocab_size
        self.layers = nn.ModuleList(load_layer(teacher, l) for l in range(start, teacher.num_layers))  # noqa: E741
        self.norm = load_norm(teacher, teacher.num_layers)
        self.head = teacher.family.head(teacher.config)
        fill(self.head, teacher, "", strip="model.")
        self.eval().requires_grad_(False)

    @cached_property
    def linear_head(self) -> nn.Linear | None:
        """The head where it is one linear map: no soft-cap, no scale, as a look at random states shows."""
        if isinstance(self.head, nn.Linear):
            return self.head
        own = self.head.get_output_embeddings() if isinstance(self.head, Logits) else None
        if not isinstance(own, nn.Linear):
            return None
        x = torch.randn(4, own.in_features, generator=torch.Generator().manual_seed(0)).to(own.weight)
        with torch.no_grad():
            same = torch.allclose(own(x).float(), self.head(x).float(), rtol=1e-3, atol=1e-3)
        return own if same else None

    def states(
        self,
        h: Float[Tensor, "sequence position feature"],
        context: AttentionContext,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> Float[Tensor, "sequence position feature"]:
        """From `h[start]` to `h[stop]` through the teacher's own layers; left out, through the whole tail."""
        first = 0 if start is None else start - self.start
        last = None if stop is None else stop - self.start
        for layer in self.layers[first:last]:
            h = layer(h, context)
        return h

    def head_input(
        self, h: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """What the head reads of `h[start]`: the last states after the final norm."""
        return self.norm(self.states(h, context))

    def forward(
        self,
        h: Float[Tensor, "sequence position feature"],
        context: AttentionContext,
        *,
        start: int | None = None,
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Next-token logits from `h[start]`; `start` defaults to the tail's own."""
        return self.logits(self.states(h, context, start=start))

    def logits(self, last: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch vocabulary"]:
        """Next-token logits of last states."""
        return self.head(self.norm(last))


class TopLogits(NamedTuple):
    """The largest logits of every position, descending, their tokens, and all logits' log-sum-exp."""

    values: Float[Tensor, "sequence position rank"]
    ids: Int32[Tensor, "sequence position rank"]
    normaliser: Float32[Tensor, "sequence position"]


class Layers(nn.Module):
    """Some of the teacher's own layers, one after the other."""

    def __init__(self, teacher: Teacher, start: int, stop: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(load_layer(teacher, index) for index in range(start, stop))

    def forward(
        self, h: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The states after the layers."""
        for layer in self.layers:
            h = layer(h, context)
        return h


def load_bridges(
    teacher: Teacher, blocks: Sequence[tuple[int, int]], device: str | torch.device
) -> list[Layers]:
    """The layers between each block and the next one, for students of several flow layers."""
    return [Layers(teacher, n, m).to(device) for (_, n), (m, _) in pairwise(blocks)]


# --- How many parameters a teacher and its layers have, from the checkpoint's headers.


def count_parameters(teacher: Teacher) -> int:
    """Parameters of the whole teacher, from the checkpoint's headers; a tied head counts once."""
    return sum(teacher.checkpoint.sizes.values())


def count_layer_parameters(teacher: Teacher, index: int = 0) -> int:
    """Parameters of one layer."""
    return sum(parameter.numel() for parameter in empty_layer(teacher, index).parameters())


def keys_fraction(teacher: Teacher) -> float:
    """Fraction of a layer's parameters that make keys and values.

    It is what a position costs at least that others still attend to.
    """
    config = teacher.config
    if teacher.family.form(config, 0) is None:
        return 0.0  # a layer without keys that others attend to, as far as anyone knows
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or teacher.width // config.num_attention_heads
    return 2 * heads * features * teacher.width / count_layer_parameters(teacher)
