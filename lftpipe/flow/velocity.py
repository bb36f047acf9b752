"""The velocity estimator u(x, t): the block's first layer, modulated by time (section 3.1, figure 1)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.flow.path import States, Times
from lftpipe.teacher.family import AttentionContext, Branches

#: Width of the time embedding's features and hidden layer. Time is one number: a small MLP is enough,
#: and at inference its outputs are constants, folded into the layer.
TIME_FEATURES = 128


def sinusoidal(t: Times, num_features: int = TIME_FEATURES) -> Float[Tensor, "sequence feature"]:
    """Sines and cosines of `t` at geometric frequencies from 1 to 1000 radians."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), num_features // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


#: Scale and gate of attention, of the MLP; then, if any, shift of attention, of the MLP.
Modulations = list[Float[Tensor, "#sequence 1 feature"]]


class Modulation(nn.Module):
    """From `t`, and the step's size if wanted, to shift, scale and gate of each branch; all zero at first."""

    def __init__(self, width: int, *, shift: bool, step: bool = False, branches: int = 2) -> None:
        super().__init__()
        self.shift, self.step = shift, step
        self.parts = (3 if shift else 2) * branches
        self.hidden = nn.Linear((1 + step) * TIME_FEATURES, TIME_FEATURES)
        self.head = nn.Linear(TIME_FEATURES, self.parts * width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, t: Times, d: Times | None = None) -> Modulations:
        # In full precision: it is a vector per sequence, and what it gives scales whole branches.
        with torch.autocast(t.device.type, enabled=False):
            features = sinusoidal(t)
            if self.step:
                assert d is not None, "this velocity knows the step's size"
                features = torch.cat([features, sinusoidal(d)], dim=-1)
            values = self.head(nn.functional.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        return list(values[:, None].chunk(self.parts, dim=-1))


class Velocity(nn.Module):
    """A teacher layer as a velocity field: its output minus its input, modulated by `t`.

    Right after construction it *is* the layer minus identity, at every `t`. A layer that is not made of two
    branches is modulated as a whole: `(1 + gate) * (layer(y) - y)` with `y = (1 + scale) * x + shift`.

    Parameters
    ----------
    layer
        The block's first layer; its weights are trained further.
    width
        Features of a state.
    time
        False leaves the modulation out: the regression baseline's plain layer.
    shift
        Whether to predict shifts; default: only where the norm has a bias that one folds into,
        so that an Euler student exports to the teacher's own architecture, and for whole layers, which
        have no such form anyway.
    source
        Whether it sees `x_0` too: `u(x_t, t, x_0)`. Trajectories may cross then: `x_0` tells them apart.
    step
        Whether it knows the size of the step that it is evaluated for: one velocity can then be the best for
        each number of steps, as in shortcut models (Frans et al., arXiv 2410.12557).
    """

    def __init__(
        self,
        layer: Branches,
        width: int,
        *,
        time: bool = True,
        shift: bool | None = None,
        source: bool = False,
        step: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.shift = (layer.whole or layer.has_norm_bias) if shift is None else shift
        branches = 1 if layer.whole else 2
        self.modulation = Modulation(width, shift=self.shift, step=step, branches=branches) if time else None
        self.source = nn.Linear(width, width, bias=False) if source else None
        if self.source is not None:
            nn.init.zeros_(self.source.weight)

    def branches(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None = None,
        *,
        source: States | None = None,
        d: Times | None = None,
    ) -> tuple[States, States]:
        """The attention's and the MLP's share of the velocity; their sum is `forward`.

        Whoever knows what `modulation(t, d)` gives may pass it as `modulations`. `source` is `x_0` and `d`
        the size of the step, for a velocity that sees it.
        """
        layer = self.layer
        if self.modulation is None:
            attention = layer.attention(layer.attention_norm(x), context)
            return attention, layer.mlp(layer.mlp_norm(x if layer.parallel else x + attention), context)
        scale_a, gate_a, scale_m, gate_m, *shifts = modulations or self.modulation(t, d)
        shift_a, shift_m = shifts or (0.0, 0.0)
        seen: States | float = 0.0
        if self.source is not None:
            assert source is not None, "this velocity sees x_0"
            seen = self.source(layer.attention_norm(source))
        normed = (1 + scale_a) * layer.attention_norm(x) + shift_a + seen
        attention = (1 + gate_a) * layer.attention(normed, context)
        y = x if layer.parallel else x + attention
        normed = (1 + scale_m) * layer.mlp_norm(y) + shift_m + seen
        return attention, (1 + gate_m) * layer.mlp(normed, context)

    def forward(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None = None,
        *,
        source: States | None = None,
        d: Times | None = None,
    ) -> States:
        if self.layer.whole:
            return self._whole(x, t, context, modulations, source=source, d=d)
        attention, mlp = self.branches(x, t, context, modulations, source=source, d=d)
        return attention + mlp

    def _whole(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None,
        *,
        source: States | None,
        d: Times | None,
    ) -> States:
        if self.modulation is None:
            return self.layer(x, context) - x
        scale, gate, *shifts = modulations or self.modulation(t, d)
        y = (1 + scale) * x + (shifts[0] if shifts else 0.0)
        if self.source is not None:
            assert source is not None, "this velocity sees x_0"
            y = y + self.source(source)
        return (1 + gate) * (self.layer(y, context) - y)
