"""What replaces a part of the layers: a linear map, a stack of layers, nothing, or a sequence of parts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.base.shape import Part
from lftpipe.families.attention import AttentionContext
from lftpipe.families.branches import Branches
from lftpipe.families.narrow import narrow
from lftpipe.flow.path import States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.velocity import Velocity

# --- The closed-form linear map from `x_0` to `x_1`: the baseline that needs no training.

#: Fraction of each input's own variance added to it, so that channels that never vary stay solvable.
RIDGE = 1e-6


class LinearMap(nn.Module):
    """`u(x) = W x + b`, used with one Euler step: `x_1 = x_0 + u(x_0)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: States, t: Times, context: AttentionContext) -> States:
        """The velocity, which depends on nothing but the state of each position."""
        del t, context  # a linear map of each position alone
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x)


class LeastSquares:
    """Sums over batches from which the least-squares map is solved; memory is the square of the inputs.

    Positions are weighted by one over their target's squared norm, as in `ErrorScale("token")`:
    the unweighted solution serves the few positions with massive activations only.

    `ridge`: fraction of each input's own variance that is added to it: how far the map is drawn to zero.
    """

    def __init__(self, inputs: int, outputs: int, ridge: float = RIDGE) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.ridge = ridge

    def add(
        self,
        x: Float[Tensor, "*batch input"],
        y: Float[Tensor, "*batch output"],
        x_1: Float[Tensor, "*batch feature"],
    ) -> None:
        """Add a batch. Products are computed in the precision of `x`, and summed in float64.

        `y`: what it should give: a part of the way to `x_1`.
        `x_1`: the state at the end, whose squared norm weighs each position.
        """
        x, y, x_1 = (each.flatten(0, -2) for each in (x, y, x_1))
        squares = (x_1.cpu() if x_1.device.type == "mps" else x_1).double().square()  # mps has no float64
        weight = (1 / (squares.sum(-1, keepdim=True) + 1e-12)).to(x)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        # On a GPU the sums stay there: nothing is waited for.
        device = x.device if x.device.type == "cuda" else torch.device("cpu")
        self.gram, self.cross = self.gram.to(device), self.cross.to(device)
        self.gram += ((weight * x).T @ x).to(device)
        self.cross += ((weight * x).T @ y.to(x)).to(device)

    def solve(
        self, *, intercept: bool = True
    ) -> tuple[Float[Tensor, "output input"], Float[Tensor, "output"]]:
        """Weight and bias of the map.

        `intercept`: whether it has a bias; without, the bias is zero.
        """
        # Scaling to a unit diagonal first: channels' variances differ by many orders.
        used = len(self.gram) if intercept else len(self.gram) - 1
        gram, cross = self.gram[:used, :used].cpu(), self.cross[:used].cpu()
        scale = gram.diagonal().clamp_min(1e-30).rsqrt()
        gram = scale[:, None] * gram * scale + self.ridge * torch.eye(len(scale), dtype=torch.float64)
        solution = scale[:, None] * torch.linalg.solve(gram, scale[:, None] * cross)
        weight = solution[: len(self.gram) - 1].T.float().contiguous()
        return weight, solution[-1].float() if intercept else weight.new_zeros(len(weight))


# --- Ordinary layers in place of a block: several of them, or one that is run several times.


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


# --- The modules of a student's parts: made from their description, and run.


def build_part(part: Part, width: int, layer: Callable[[], Branches]) -> nn.Module:
    """The module of a part, without its weights."""
    if part.kind == "linear":
        return LinearMap(width)
    if part.kind == "skip":
        return NoLayer()
    layers = [narrow(layer(), part.width) for _ in range(part.depth)]
    if part.kind == "layers":
        return LayerStack(layers, part.loops)
    kinds = {"time": part.kind == "flow", "shift": part.shift, "source": part.source, "step": part.step}
    return Velocity(layers[0], width, **kinds)


def carry(
    flow: nn.Module, x_0: States, context: AttentionContext, method: Method = "euler", k: int = 1
) -> States:
    """From the start of what a module replaces to its end, as at inference (algorithm 3)."""
    if isinstance(flow, PartSequence):
        for end in flow.ends(x_0, context, method, k):
            x_0 = end
        return x_0
    if isinstance(flow, LayerStack):
        return flow.run(x_0, repeat(context))
    if not isinstance(flow, Velocity):
        return x_0 + flow(x_0, x_0.new_zeros(len(x_0)), context)
    if flow.modulation is None:
        method, k = "euler", 1

    def velocity(x: States, t: Times, step_size: Times) -> States:
        return flow(x, t, context, source=x_0, step_size=step_size)

    return ODESolver(velocity).sample(x_0, 1 / k, method)


class PartSequence(nn.Module):
    """Several parts of one student, and between them layers that stay the teacher's.

    Its weights are those of the parts: the teacher's layers are moved with it, but are no part of its state.
    """

    modulation = None
    source = None

    def __init__(self, parts: Sequence[nn.Module], between: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._between = list(between)  # in a list, so that optimisers and files do not see them

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        for layers in self._between:
            layers._apply(*arguments, **options)
        return super()._apply(*arguments, **options)

    def enter(self, number: int, x: States, context: AttentionContext) -> States:
        """From the end of the part before to the start of a part."""
        return self._between[number - 1](x, context) if number else x

    def ends(
        self, x: States, context: AttentionContext, method: Method = "euler", k: int = 1
    ) -> Iterator[States]:
        """The states at the end of each part."""
        for number, part in enumerate(self.parts):
            x = carry(part, self.enter(number, x, context), context, method, k)
            yield x

    def forward(self, x: States, t: Times, context: AttentionContext, *_: Any, **__: Any) -> Tensor:
        """What all parts together add to the states, each in one step."""
        del t
        return carry(self, x, context) - x
