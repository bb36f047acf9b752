"""The modules of a student's parts: made from their description, and run."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from lftpipe.base.shape import Part
from lftpipe.families.attention import AttentionContext
from lftpipe.families.branches import Branches
from lftpipe.families.narrow import narrow
from lftpipe.flow.linear import LinearMap
from lftpipe.flow.path import States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.stack import LayerStack, NoLayer
from lftpipe.flow.velocity import Velocity


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
