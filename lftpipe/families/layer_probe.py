"""What a layer's form is, read off a layer of zeros: which norm and branch comes first, which maps."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lftpipe.families.attention import Arguments
from lftpipe.families.family import Branch, LayerForm

# --- The linear maps inside a layer, whichever way round their weights are stored: GPT-2's are transposed.


def is_linear_map(part: nn.Module) -> bool:
    """Whether a module is a linear map with a weight, and no more."""
    return isinstance(part, nn.Linear | Conv1D)


def is_transposed(part: nn.Module) -> bool:
    """Whether a linear map's weight is stored as `(input, output)`."""
    return isinstance(part, Conv1D)


def weight_of(part: Any) -> Float[Tensor, "output input"]:
    """A linear map's weight, of which changes in place are changes of the map."""
    return part.weight.T if is_transposed(part) else part.weight


# --- The form of one layer: which norms, which two branches, what is added to what.
#
# It is found by running the layer's own forward pass with its parts replaced by stand-ins that return
# random states: what each part was given, and what the layer made of what they returned, says how it is
# built.

#: Relative error up to which two sums of random states are the same.
CLOSE = 1e-4

#: How many values the attention module and the MLP return beside the states: 0 is the bare tensor.
ARITIES = ((1, 0), (0, 0), (1, 1), (2, 0), (0, 1), (2, 1))


@dataclass
class Call:
    """One part of a layer as it was called: what it read, with what else, and what it returned."""

    name: str
    module: nn.Module
    read: Tensor
    arguments: dict[str, Any]
    made: Tensor

    @property
    def is_norm(self) -> bool:
        """Whether its class is a norm by its name."""
        return "norm" in type(self.module).__name__.lower()


class _StandIn(nn.Module):
    """In the place of a layer's part: returns random states and notes the call."""

    def __init__(self, name: str, module: nn.Module, calls: list[Call], generator: torch.Generator) -> None:
        super().__init__()
        self._of = (name, module, calls, generator)
        self.arity = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][1], name)

    def forward(self, *given: Any, **named: Any) -> Any:
        name, module, calls, generator = self._of
        signature = inspect.signature(module.forward)
        arguments = dict(signature.bind(*given, **named).arguments)
        read = arguments.pop(next(iter(signature.parameters)))
        for parameter in signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        made = torch.randn(read.shape, generator=generator)
        calls.append(Call(name, module, read.clone(), arguments, made.clone()))  # some layers add in place
        return made if self.arity == 0 else (made, *[None] * self.arity)


def find_form(layer: nn.Module, arguments: Arguments, width: int) -> LayerForm | None:
    """The branches of a layer, or None if it is not made of two.

    `layer`: on any device, the meta device too: its weights are not used.
    `arguments`: what the model calls it with, for one sequence of four positions.
    """
    for arities in ARITIES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, width, generator=generator)
        calls: list[Call] = []
        try:
            with torch.no_grad():
                y = _hollow(layer, calls, generator, arities).forward(x, **arguments)
            y = y[0] if isinstance(y, tuple) else y
            form = _read_form(layer, x, y, calls, arguments) if y.shape == x.shape else None
        except Exception:  # whatever a wrong arity, or a layer of another form, runs into
            continue
        if form is not None:
            return form
    return None


def _hollow(
    layer: nn.Module, calls: list[Call], generator: torch.Generator, arities: tuple[int, int]
) -> nn.Module:
    """A copy of the layer with stand-ins for its parts."""
    hollow = copy.copy(layer)
    hollow._modules = dict(layer._modules)
    modules = 0
    for name, part in layer.named_children():
        bare = isinstance(part, nn.Dropout | nn.Identity) or not list(part.parameters())
        if bare and "norm" not in type(part).__name__.lower():  # OLMo's norm has no weights
            continue
        stand_in = _StandIn(name, part, calls, generator)
        if "norm" not in type(part).__name__.lower():
            stand_in.arity = arities[0 if _mixes(name, part) else 1]
            modules += 1
        hollow._modules[name] = stand_in
    if modules < 2:
        raise ValueError("fewer than two parts")
    return hollow


def _mixes(name: str, part: nn.Module) -> bool:
    """Whether a part mixes positions, by its name."""
    word = f"{name} {type(part).__name__}".lower()
    return any(each in word for each in ("attn", "attention", "mixer", "mamba", "conv", "recurrent", "delta"))


def _read_form(
    layer: nn.Module, x: Tensor, y: Tensor, calls: list[Call], arguments: Arguments
) -> LayerForm | None:
    parts = [call for call in calls if not call.is_norm]
    norms = [call for call in calls if call.is_norm]
    if len(parts) != 2:
        return None
    first, second = parts if _mixes(parts[0].name, parts[0].module) else reversed(parts)
    first_norm, first_read = _before(first, norms)
    second_norm, second_read = _before(second, norms)
    first_post, first_made = _after(first, norms)
    second_post, second_made = _after(second, norms)
    used = {each for each in (first_norm, second_norm, first_post, second_post) if each}
    if not _same(first_read, x) or used != {norm.name for norm in norms}:
        return None
    parallel = _same(second_read, x)
    scale = 1.0 if parallel else _scale(second_read - x, first_made, layer)
    both = _scales(y - x, first_made, second_made, layer)
    if both is None or scale is None or (not parallel and both[0] != scale):
        return None
    given = [_sources(call, arguments) for call in (first, second)]
    if given[0] is None or given[1] is None:
        return None
    return LayerForm(
        Branch(first.name, first_norm, first_post, _last_map(first, x.shape[-1]), both[0], given[0]),
        Branch(second.name, second_norm, second_post, _last_map(second, x.shape[-1]), both[1], given[1]),
        parallel=parallel,
        is_attention=any("attention" in type(m).__name__.lower() for m in first.module.modules()),
    )


def _before(call: Call, norms: list[Call]) -> tuple[str | None, Tensor]:
    """The norm that a part reads through, if any, and what is read."""
    for norm in norms:
        if _same(call.read, norm.made):
            return norm.name, norm.read
    return None, call.read


def _after(call: Call, norms: list[Call]) -> tuple[str | None, Tensor]:
    """The norm that a part's output passes, if any, and what comes of it."""
    for norm in norms:
        if _same(norm.read, call.made):
            return norm.name, norm.made
    return None, call.made


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * b.abs().max())


def _scale(total: Tensor, part: Tensor, layer: nn.Module) -> float | None:
    value = ((total * part).sum() / part.square().sum()).item()
    return _exact(value, layer) if _same(value * part, total) else None


def _scales(total: Tensor, a: Tensor, b: Tensor, layer: nn.Module) -> tuple[float, float] | None:
    basis = torch.stack([a.flatten(), b.flatten()], dim=1).double()
    solved = torch.linalg.lstsq(basis, total.flatten().double()[:, None]).solution[:, 0]
    if not _same(solved[0].item() * a + solved[1].item() * b, total):
        return None
    return _exact(solved[0].item(), layer), _exact(solved[1].item(), layer)


def _exact(value: float, layer: nn.Module) -> float:
    """The number that a sum shows only to a few digits: one, or one that the layer keeps."""
    kept = [each for each in _numbers(layer) if abs(each - value) < 1e-4]
    return min(kept, key=lambda each: abs(each - value)) if kept else value


def _numbers(layer: nn.Module) -> Iterator[float]:
    yield 1.0
    for value in vars(layer).values():
        if isinstance(value, float):
            yield value


def _sources(call: Call, arguments: Arguments) -> tuple[tuple[str, str], ...] | None:
    """Where each keyword of a part comes from; None if the layer computes one of them."""
    found = []
    for name, value in call.arguments.items():
        if name in arguments and arguments[name] is value:
            found.append((name, name))
            continue
        same = [key for key, given in arguments.items() if given is value]
        if same and value is not None:
            found.append((name, same[0]))
        elif value is not None and value is not False:
            return None
    return tuple(found)


def _last_map(call: Call, width: int) -> str | None:
    """The linear map that ends a part: the last of its own with as many outputs as a state has."""
    last = None
    for name, part in call.module.named_children():
        if is_linear_map(part) and len(weight_of(part)) == width:
            last = f"{call.name}.{name}"
    return last
