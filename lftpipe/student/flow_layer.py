"""A flow layer inside a transformers model, and its place in the KV cache."""

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lftpipe.base.shape import Part
from lftpipe.families.attention import AttentionContext
from lftpipe.families.branches import Branches
from lftpipe.families.family import Family
from lftpipe.flow.part import LayerStack, build_part
from lftpipe.flow.path import States, Times
from lftpipe.flow.solver import Method, ODESolver
from lftpipe.flow.velocity import Modulations, Velocity

# --- One place of a KV cache.


class Slot:
    """One place of a KV cache, whatever index the attention that writes to it believes to have."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of this evaluation, behind those it had before.

        `layer_idx`: of the layer that asks, which has a slot of its own instead.
        """
        del layer_idx
        return self._cache.update(keys, values, self._index, *rest, **named)


def number_layer(layer: nn.Module, index: int) -> None:
    """Let a layer's parts take this place of the cache for theirs.

    `layer`: of any family; parts that know of a cache have a `layer_idx`.
    """
    for part in layer.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = index  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


# --- The layer that stands in a student for a block: it carries states through by velocity and solver.


class FlowLayer(GradientCheckpointingLayer):
    """Carries states from a block's start to its end (algorithm 3), in the place of its layers.

    `layer`: the teacher's first layer there, as its own constructor builds it: the flow is made of it.
    `arity`: how many values layers of the family return beside the states.
    """

    def __init__(self, family: Family, config: Any, block: Part, layer: nn.Module, arity: int) -> None:
        super().__init__()
        self._stands_for = [layer]  # in a list, so that it is no part of this module
        self._arity = arity
        self._signature = inspect.signature(layer.forward)
        # transformers records what comes out of layers of the family's own class.
        self.__class__ = _as_layer(type(layer))  # pyright: ignore[reportAttributeAccessIssue]
        self.block = block
        self.cache_argument = family.cache_argument
        self.velocity = build_part(
            block,
            config.hidden_size,
            lambda: Branches(
                family, config, block.start, copy.deepcopy(layer) if block.kind == "layers" else layer
            ),
        )
        if isinstance(self.velocity, Velocity):
            zeros = [self.velocity.modulation and self.velocity.modulation.head, self.velocity.source]
            for module in filter(None, zeros):
                # Tells transformers to leave it as it is in a model with new weights: zero.
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        self.method: Method = "euler"
        self.steps = 1
        self.slots: Sequence[int] = (0,)
        self._remembered: dict[tuple[Any, ...], Modulations] = {}
        self._remembered_of: list[tuple[Any, ...]] = []

    def set_steps(self, steps: int, method: Method, slots: Sequence[int]) -> None:
        """Choose the number of steps and the solver; flows without time have one step of Euler's.

        `steps`, `method`: how to go from the block's start to its end.
        """
        timed = self.block.kind == "flow"
        self.steps, self.method = (steps, method) if timed else (1, "euler")
        self.slots = slots

    @property
    def times(self) -> Float[Tensor, "time"]:
        """The times at which steps begin."""
        return torch.linspace(0, 1, self.steps + 1)[:-1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stands_for" not in self.__dict__:
                raise
            return getattr(self.__dict__["_stands_for"][0], name)  # models read `layer.attention_type`, say

    def forward(self, *given: Any, **named: Any) -> Any:
        """From the block's start to its end.

        `*given`, `**named`: as the family's own layer takes them; of them only the cache is looked at.
        """
        arguments = dict(self._signature.bind(*given, **named).arguments)
        states: Tensor = arguments.pop(next(iter(self._signature.parameters)))
        for parameter in self._signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        out = self.carry(states, self._contexts(states, arguments))
        return out if self._arity == 0 else (out, *[None] * (self._arity - 1))

    def carry(self, hidden_states: States, contexts: Iterator[AttentionContext]) -> States:
        """From the block's start to its end; each evaluation has a context of its own."""
        if isinstance(self.velocity, LayerStack):
            return self.velocity.run(hidden_states, contexts)
        evaluations = itertools.count()
        self._forget_if_changed()

        def velocity(x: States, t: Times, step_size: Times) -> States:
            if self.block.kind == "linear":
                return self.velocity(x, t, next(contexts))
            modulations = self._modulations(next(evaluations), t, step_size)
            return self.velocity(x, t, next(contexts), modulations, source=hidden_states, step_size=step_size)

        return ODESolver(velocity).sample(hidden_states, 1 / self.steps, self.method)

    def _modulations(self, evaluation: int, t: Times, step_size: Times) -> Modulations | None:
        """What the modulation gives at an evaluation, where that can be known beforehand.

        It depends on nothing but time and step, which are the same in every forward pass: a good part of
        what an evaluation for a single token costs. With gradients it is computed as it comes.
        """
        modulation = getattr(self.velocity, "modulation", None)
        if modulation is None or torch.is_grad_enabled():
            return None
        key = (self.method, self.steps, evaluation)
        if key not in self._remembered:
            self._remembered[key] = modulation(t[:1], step_size[:1])
        return self._remembered[key]

    def _forget_if_changed(self) -> None:
        """Forget modulations that were computed from other weights."""
        modulation = getattr(self.velocity, "modulation", None)
        weights = [] if modulation is None else list(modulation.parameters())
        # Tensors that were made in inference mode count no changes: nothing is remembered of them.
        now = [
            (
                weight.data_ptr(),
                weight.dtype,
                weight.device,
                object() if weight.is_inference() else weight._version,
            )
            for weight in weights
        ]
        if now != self._remembered_of:
            self._remembered, self._remembered_of = {}, now

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._remembered_of = []  # moved and back again, weights may lie where they lay before
        return super()._apply(*arguments, **options)

    def _contexts(self, states: Tensor, arguments: dict[str, Any]) -> Iterator[AttentionContext]:
        """The context of each evaluation, each with its own place in the cache."""
        cache = arguments.get(self.cache_argument)
        places = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        if cache is not None and self.block.kind == "linear":
            # Masks are as long as what a place holds, so that one without keys must count positions too.
            nothing = states.new_zeros(len(states), 1, states.shape[1], 1)
            cache.update(nothing, nothing, self.slots[0])
        for slot in self.slots:
            seen = dict(arguments) | ({} if cache is None else {self.cache_argument: Slot(cache, slot)})
            yield AttentionContext(places, {self.block.start: seen})


@cache
def _as_layer(kind: type[nn.Module]) -> type[FlowLayer]:
    """`FlowLayer`, as a subclass of a family's layers too."""
    return type(FlowLayer.__name__, (FlowLayer, kind), {"__module__": __name__})
