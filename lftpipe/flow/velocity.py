"""The velocity estimator u(x, t): the block's first layer, modulated by time (section 3.1, figure 1)."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.families.attention import AttentionContext
from lftpipe.families.branches import Branches
from lftpipe.flow.path import States, Times

#: Width of the time embedding's features and hidden layer. Time is one number: a small MLP is enough,
#: and at inference its outputs are constants, folded into the layer.
TIME_FEATURES = 128


def sinusoidal(t: Times, num_features: int = TIME_FEATURES) -> Float[Tensor, "sequence feature"]:
    """Sines and cosines of `t` at geometric frequencies from 1 to 1000 radians.

    Parameters
    ----------
    t
        One time, or one step size, per sequence.
    num_features
        Half of them sines, half cosines.
    """
    angles = t.float()[:, None] * _frequencies(num_features // 2, t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@cache
def _frequencies(count: int, device: torch.device) -> Float[Tensor, "frequency"]:
    with torch.inference_mode(
        mode=False
    ):  # it outlives the call: a tensor of that mode takes no part in autograd
        return torch.exp(torch.linspace(0, math.log(1000), count, device=device))


#: Scale and gate of attention, of the MLP; then, if any, shift of attention, of the MLP.
Modulations = list[Float[Tensor, "#sequence 1 feature"]]


class Modulation(nn.Module):
    """From `t`, and the step size if wanted, to shift, scale and gate of each branch; all zero at first.

    Parameters
    ----------
    width
        Features of a state.
    shift
        Whether to predict shifts too.
    step
        Whether it is told the step size.
    """

    def __init__(self, width: int, *, shift: bool, step: bool = False, branches: int = 2) -> None:
        super().__init__()
        self.shift, self.step = shift, step
        self.parts = (3 if shift else 2) * branches
        self.hidden = nn.Linear((1 + step) * TIME_FEATURES, TIME_FEATURES)
        self.head = nn.Linear(TIME_FEATURES, self.parts * width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, t: Times, step_size: Times | None = None) -> Modulations:
        """Scales, gates and shifts at one time per sequence.

        Parameters
        ----------
        t
            The times.
        step_size
            Of the steps that begin there, for a modulation that is told.
        """
        # In full precision: it is a vector per sequence, and what it gives scales whole branches.
        with torch.autocast(t.device.type, enabled=False):
            features = sinusoidal(t)
            if self.step:
                assert step_size is not None, "this velocity is told the step size"
                features = torch.cat([features, sinusoidal(step_size)], dim=-1)
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
        Whether it is told the size of the step that it is evaluated for: one velocity can then be the best
        for each number of steps, as in shortcut models (Frans et al., arXiv 2410.12557).
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
        self.shift = self.shifts(layer) if shift is None else shift
        branches = 1 if layer.whole else 2
        self.modulation = Modulation(width, shift=self.shift, step=step, branches=branches) if time else None
        self.source = nn.Linear(width, width, bias=False) if source else None
        if self.source is not None:
            nn.init.zeros_(self.source.weight)

    @staticmethod
    def shifts(layer: Branches) -> bool:
        """Whether a velocity made of this layer predicts shifts where nothing else is asked.

        Parameters
        ----------
        layer
            The teacher's, as its two branches.
        """
        return layer.whole or layer.has_norm_bias

    def branches(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None = None,
        *,
        source: States | None = None,
        step_size: Times | None = None,
    ) -> tuple[States, States]:
        """The attention's and the MLP's part of the velocity; their sum is `forward`.

        Parameters
        ----------
        x, t
            States, and one time per sequence.
        context
            Positions and mask of the sequences.
        modulations
            What `modulation(t, step_size)` gives, for callers that know it already.
        source
            `x_0`, for a velocity that sees it.
        step_size
            For a velocity that is told it.
        """
        layer = self.layer
        if self.modulation is None:
            attention = layer.attention(layer.attention_norm(x), context)
            return attention, layer.mlp(layer.mlp_norm(x if layer.parallel else x + attention), context)
        scale_a, gate_a, scale_m, gate_m, *shifts = modulations or self.modulation(t, step_size)
        shift_a, shift_m = shifts or (None, None)
        seen: States | None = None
        if self.source is not None:
            assert source is not None, "this velocity sees x_0"
            seen = self.source(layer.attention_norm(source))
        normed = _sum((1 + scale_a) * layer.attention_norm(x), shift_a, seen)
        attention = (1 + gate_a) * layer.attention(normed, context)
        y = x if layer.parallel else x + attention
        normed = _sum((1 + scale_m) * layer.mlp_norm(y), shift_m, seen)
        return attention, (1 + gate_m) * layer.mlp(normed, context)

    def forward(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None = None,
        *,
        source: States | None = None,
        step_size: Times | None = None,
    ) -> States:
        """The velocity `u(x, t)`.

        Parameters
        ----------
        x, t, context, modulations, source, step_size
            As for `branches`.
        """
        if self.layer.whole:
            return self._whole(x, t, context, modulations, source=source, step_size=step_size)
        attention, mlp = self.branches(x, t, context, modulations, source=source, step_size=step_size)
        return attention + mlp

    def _whole(
        self,
        x: States,
        t: Times,
        context: AttentionContext,
        modulations: Modulations | None,
        *,
        source: States | None,
        step_size: Times | None,
    ) -> States:
        if self.modulation is None:
            return self.layer(x, context) - x
        scale, gate, *shifts = modulations or self.modulation(t, step_size)
        y = (1 + scale) * x + (shifts[0] if shifts else 0.0)
        if self.source is not None:
            assert source is not None, "this velocity sees x_0"
            y = y + self.source(source)
        return (1 + gate) * (self.layer(y, context) - y)


def _sum(x: States, *others: Tensor | None) -> States:
    """Of what is there: to add a zero is a pass over all states, too."""
    for other in others:
        x = x if other is None else x + other
    return x
