"""Hooks that hand out what flows through a model's layers, and the proof that it is the right thing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lftpipe.base.errors import TeacherError
from lftpipe.families.family import LayerForm

#: Called with `(l, tensor)`; the tensor is `(sequence, position, feature)` and must be used at once.
Sink = Callable[[int, Tensor], None]

#: Tokens that a model is tried on when it is loaded, and where its second segment begins.
TRIED, SECOND = 8, 5

#: Runs the model on token ids and position ids, `(sequence, position)`; options go to its forward pass.
Run = Callable[..., Any]


@contextmanager
def hooks(
    layers: nn.ModuleList,
    forms: list[LayerForm | None],
    deepest: int,
    hidden: Sink | None,
    attention: Sink | None,
) -> Iterator[None]:
    """Hand out every `h[l]` and `a[l]` of the forward passes inside the block.

    `forms`: their branches; a layer without an attention branch hands out no `a[l]`.
    """
    placed = []
    if hidden:
        for index, layer in enumerate(layers):
            if index <= deepest:
                placed.append(layer.register_forward_pre_hook(_entering(index, hidden), with_kwargs=True))
        if deepest == len(layers):
            placed.append(layers[-1].register_forward_hook(_leaving(deepest, hidden)))
    if attention:
        for index, (layer, form) in enumerate(zip(layers, forms, strict=True)):
            if form is not None and form.is_attention:
                end = layer.get_submodule(form.attention.post_norm or form.attention.module)
                placed.append(end.register_forward_hook(_leaving(index, attention, form.attention.scale)))
    try:
        yield
    finally:
        for each in placed:
            each.remove()


def _entering(index: int, sink: Sink) -> Callable[..., None]:
    def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sink(index, given[0] if given else named["hidden_states"])

    return hook


def _leaving(index: int, sink: Sink, scale: float = 1.0) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        sink(index, states if scale == 1 else states * scale)

    return hook


@torch.inference_mode()
def check(
    run: Run, capture: Callable[[Sink], Any], name: str, vocabulary: int, deepest: int, apart: bool
) -> bool:
    """Try hooks on a few tokens; whether segments have to be run one by one.

    `apart`: whether it is known already that the model does not keep segments apart.
    Raises `TeacherError` if what is captured is not what transformers says the hidden states are, or a state
    depends on tokens that come after it.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, TRIED), generator=generator)
    places = torch.arange(TRIED)[None]

    def states_of(
        tokens: Int[Tensor, "sequence position"], places: Int[Tensor, "sequence position"], **options: Any
    ) -> tuple[dict[int, Tensor], Any]:
        states: dict[int, Tensor] = {}
        with capture(lambda layer, state: states.update({layer: state.clone()})):
            output = run(tokens, places, **options)
        return states, output

    states, output = states_of(tokens, places, output_hidden_states=True)
    theirs = getattr(output, "hidden_states", None)
    _compare(states, theirs, name, deepest)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocabulary
    later, _ = states_of(changed, places)
    if any(not close(later[layer][:, :-1], state[:, :-1], 1e-5) for layer, state in states.items()):
        raise TeacherError(
            f"model {name}, whose states depend on tokens that come later",
            "a causal decoder (this is an encoder, or its config says is_decoder false)",
            "choose a causal language model",
        )
    if apart:
        return True
    packed, _ = states_of(tokens, torch.cat([places[:, :SECOND], places[:, : TRIED - SECOND]], 1))
    alone, _ = states_of(tokens[:, SECOND:], places[:, : TRIED - SECOND])
    # A leak shows after one layer already; further up rounding errors grow.
    return any(
        not close(packed[layer][:, SECOND:], state, 1e-4 if layer == 1 else 1e-3)
        for layer, state in alone.items()
    )


def _compare(states: dict[int, Tensor], theirs: Any, name: str, deepest: int) -> None:
    """What hooks captured against what transformers hands out, but for the last, which it norms."""
    if theirs is None:
        raise TeacherError(
            f"model {name}, which hands out no hidden states",
            "output_hidden_states of transformers, to check what is captured",
            "choose another model",
        )
    kept = list(range(deepest))
    for offset in (0, 1):  # some models leave the first state out
        pairs = [(states.get(layer + offset), layer) for layer in kept if layer + offset < max(deepest, 2)]
        if pairs and all(
            state is not None and layer < len(theirs) and close(state, theirs[layer])
            for state, layer in pairs
        ):
            return
    if kept:
        raise TeacherError(
            f"model {name}, whose states are not what enters its layers",
            "layers that each read the residual stream that the one before left",
            "choose another model: nothing was stored",
        )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two states are the same up to rounding."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()  # whoever stores them says where a teacher computes NaN
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))
