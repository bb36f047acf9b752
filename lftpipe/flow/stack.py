"""Ordinary layers in place of a block: several of them, or one that is run several times."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import nn

from lftpipe.families.attention import AttentionContext
from lftpipe.families.branches import Branches
from lftpipe.flow.path import States, Times


class LayerStack(nn.Module):
    """`depth` layers of the teacher's kind, run `loops` times in a row, as one velocity without time.

    One Euler step makes `x_1 = x_0 + u(x_0)`, where `u` is the stack's output minus its input. With `loops`
    above 1 the same weights are used again, as in looped transformers: as many evaluations as a flow in so
    many steps, but no time and no step size.
    """

    modulation = None
    source = None

    def __init__(self, layers: Sequence[Branches], loops: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.loops = loops
        self.shift = layers[0].has_norm_bias

    @property
    def evaluations(self) -> int:
        """Layers that are run in all."""
        return len(self.layers) * self.loops

    def run(self, x: States, contexts: Iterator[AttentionContext]) -> States:
        """The states after all layers."""
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(x, next(contexts))
        return x

    def forward(self, x: States, t: Times, context: AttentionContext, *ignored: Any, **unused: Any) -> States:
        """What the stack adds to the states."""
        del t, ignored, unused
        return self.run(x, repeat(context)) - x


class NoLayer(nn.Module):
    """The velocity of a block that is left out: zero."""

    modulation = None

    def forward(self, x: States, t: Times, context: AttentionContext, *ignored: Any, **unused: Any) -> States:
        """Zeros in the shape of the states."""
        del t, context, ignored, unused
        return torch.zeros_like(x)
