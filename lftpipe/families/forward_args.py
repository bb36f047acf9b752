"""A model around its layers, without weights: what its own code calls each layer with.

Masks, windows, several rotary bases, position ids: whatever a family's layers need beside the states, the
model's forward pass makes it. Run with recorders in the place of the layers, it hands out just that.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lftpipe.families import meta_model
from lftpipe.families.attention import Arguments, AttentionContext

#: What a recorder returns beside the states, in the order in which it is tried: the model may unpack it.
LAYER_ARITIES = (0, 1, 2, 3)


class Recorder(nn.Module):
    """Stands in the place of a layer: passes the states on and keeps what else it was called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stood_for = [layer]  # in a list, so that it is no part of this module
        self._signature = inspect.signature(layer.forward)
        self.arity = 0
        self.arguments: Arguments | None = None
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_for"][0], name)  # models read `layer.attention_type`, say

    def forward(self, *given: Any, **named: Any) -> Any:
        """Note what the layer is called with."""
        bound = self._signature.bind(*given, **named)
        arguments = dict(bound.arguments)
        states = arguments.pop(next(iter(arguments)))
        for parameter in self._signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        self.arguments, self.states = arguments, states
        return states if self.arity == 0 else (states, *[None] * (self.arity - 1))


class Zeros(nn.Module):
    """Stands in the place of an embedding, without its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros of the embedding's shape."""
        return torch.zeros(*ids.shape, self.width, device=ids.device)


class Passed(Zeros):
    """Stands in the place of a module with weights outside the layers; notes what passes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(0)
        self._stood_for = [module]
        self.read: Tensor | None = None
        self.made: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_for"][0], name)

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The states, as they are."""
        self.read, self.made = states, states.clone()
        return self.made


def _place(tensor: Tensor | None) -> int | None:
    """Where a tensor lies: the same for a view of it."""
    return None if tensor is None else tensor.data_ptr()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def alike(a: Arguments, b: Arguments) -> bool:
    """Whether a layer is called with the same tensors."""
    ours, theirs = list(_tensors(a)), list(_tensors(b))
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)
    )


def _first_row(value: Any) -> Any:
    """Of nested arguments for two sequences, those for the first."""
    if isinstance(value, Tensor):
        return value[:1] if value.ndim and len(value) == 2 else value
    if isinstance(value, Mapping):
        return {name: _first_row(each) for name, each in value.items()}
    return [_first_row(each) for each in value] if isinstance(value, list | tuple) else value


def _separates(mask: Tensor) -> bool:
    """Whether this is a mask of six positions that hides the first three from the last."""
    if mask.ndim != 4 or mask.shape[-2:] != (6, 6):
        return False
    hidden = mask[..., 3:, :3]
    return not bool(hidden.any()) if mask.dtype == torch.bool else bool((hidden < -1e4).all())


class Frame(nn.Module):
    """The base model of a teacher with recorders for layers, and nothing that has weights."""

    apart: bool = False
    """Whether the layers keep no segments apart by themselves."""

    def __init__(self, config: Any, implementation: str) -> None:
        super().__init__()
        model = meta_model.build(config, implementation)
        path = meta_model.layers_path(model)
        self.recorders = [Recorder(layer) for layer in model.get_submodule(path)]
        model.set_submodule(path, nn.ModuleList(self.recorders))
        self.passed: dict[str, Passed] = {}
        base = model.base_model
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Embedding):
                base.set_submodule(name, Zeros(module.embedding_dim))
            elif name and not list(module.children()) and (list(module.parameters()) or _is_norm(module)):
                self.passed[name] = Passed(module)
                base.set_submodule(name, self.passed[name])
        meta_model.materialise_buffers(model, base)
        self.base, self.width = base, model.config.hidden_size
        self._one_at_a_time = threading.Lock()  # threads share its recorders
        self._accepted = inspect.signature(base.forward).parameters
        self._find_arity()
        self.apart = not self._hides_other_segments()

    @property
    def final_norm(self) -> str | None:
        """Path in the base model to the one module between the last layer and what the model returns."""
        last = _place(self.recorders[-1].states)
        between = [name for name, each in self.passed.items() if _place(each.read) == last]
        ends = [name for name in between if _place(self.passed[name].made) == _place(self._returned)]
        return ends[0] if len(ends) == 1 else None

    @lru_cache(maxsize=4096)  # noqa: B019 (a frame lives as long as what it belongs to)
    def looks_at_length(self, longest: int) -> bool:
        """Whether a short sequence is run otherwise beside one of so many positions, as longrope has it."""
        if longest <= 4:
            return False
        buffers = list(self.buffers())
        places = torch.arange(4, device=buffers[0].device if buffers else "cpu")[None]
        alone = self.arguments(places)
        beside = self.arguments(torch.cat([places, places + longest - 4]))
        return not all(alike(alone[index], _first_row(beside[index])) for index in alone)

    @property
    def reads_embedding(self) -> bool:
        """Whether layers are told more of the tokens than their states and positions."""
        generator = torch.Generator().manual_seed(0)
        places = torch.arange(4)[None]
        noise = torch.randn(1, 4, self.width, generator=generator)
        plain, told = self.arguments(places), self.arguments(places, noise)
        return not all(alike(plain[index], told[index]) for index in plain)

    def _hides_other_segments(self) -> bool:
        """Whether every layer gets a mask in which the second segment does not see the first."""
        two = self.arguments(torch.tensor([[0, 1, 2, 0, 1, 2]]))
        return all(any(map(_separates, _tensors(each))) for each in two.values())

    def _find_arity(self) -> None:
        error: Exception | None = None
        for arity in LAYER_ARITIES:
            for recorder in self.recorders:
                recorder.arity = arity
            try:
                self.arguments(torch.arange(4)[None])
            except Exception as raised:  # whatever a wrong arity runs into
                error = error or raised
                continue
            if all(r.states is not None and r.states.shape == (1, 4, self.width) for r in self.recorders):
                return
        raise ValueError(f"its layers cannot be called alone ({error})")

    def arguments(
        self, position_ids: Int[Tensor, "sequence position"], embeddings: Tensor | None = None
    ) -> dict[int, Arguments]:
        """What every layer is called with, beside the states, by index."""
        if embeddings is None:
            embeddings = torch.zeros(*position_ids.shape, self.width, device=position_ids.device)
        given: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        if "position_ids" in self._accepted:
            given["position_ids"] = position_ids
        with self._one_at_a_time:
            for recorder in self.recorders:
                recorder.arguments = recorder.states = None
            output = self.base(**given)
            self._returned = output[0] if isinstance(output, tuple) else output.last_hidden_state
            found = {i: r.arguments for i, r in enumerate(self.recorders) if r.arguments is not None}
        if len(found) < len(self.recorders):
            raise ValueError("its forward pass skips layers")
        return found

    @torch.no_grad()
    def context(self, position_ids: Int[Tensor, "sequence position"]) -> AttentionContext:
        """Everything that layers need to know of a batch."""
        several = bool((position_ids[:, 1:] == 0).any())
        apart = several and (self.apart or self.looks_at_length(int(position_ids.max()) + 1))
        return AttentionContext(
            position_ids=position_ids,
            layers={} if apart else self.arguments(position_ids),
            again=self.context,
            apart=apart,
        )
