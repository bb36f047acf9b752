"""Forward passes of the frozen teacher: the trunk with hooks, its logits, and layer by layer."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lftpipe.base.device import autocast, cast_linear, move
from lftpipe.families import meta_model
from lftpipe.families.attention import AttentionContext, attention_context, known_segments, spans_of
from lftpipe.families.branches import Branches
from lftpipe.families.structure import structure_of
from lftpipe.teacher import capture
from lftpipe.teacher.capture import Sink
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail, TopLogits
from lftpipe.teacher.thread_pool import Lanes

# --- The teacher's trunk: embedding and layers up to the deepest state asked for, with hooks.
#
# The LM head is never loaded, the layers above the deepest state neither.

__all__ = ["Sink", "Trunk", "twin_of"]

Module = TypeVar("Module", bound=nn.Module)


class Trunk:
    """Runs the layers below state `deepest` and hands out what flows through them.

    `deepest`: the deepest state `h[l]` wanted; layers `0 .. l-1` are loaded and run.
    `compute_dtype`: `torch.bfloat16` runs matrix products in it and keeps the residual stream in float32.
    Raises `TeacherError` if its weights do not load, or the hooks do not give what transformers says the
    states are.
    """

    def __init__(
        self, teacher: Teacher, deepest: int, compute_dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.teacher, self.deepest = teacher, deepest
        self.compute_dtype = torch.float32  # as long as it is tried
        self.device = torch.device("cpu")
        self.model = model = _base(teacher, deepest).eval().requires_grad_(False)
        self._layers_path = teacher.family.model_layers
        self._layers: Any = model.get_submodule(self._layers_path)
        self._forms = [teacher.family.form(teacher.config, index) for index in range(len(self._layers))]
        longest = teacher.max_positions
        self._by_length = longest is not None and structure_of(teacher.config).looks_at_length(longest)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        taken = partial(capture.hooks, self._layers, self._forms, deepest, attention=None)
        self.apart = capture.check(
            self._forward,
            taken,
            teacher.model,
            teacher.config.vocab_size,
            deepest,
            not self._takes_positions,
        )
        if teacher.family.model_norm:
            model.set_submodule(teacher.family.model_norm, nn.Identity())  # no state is taken after it
        self.compute_dtype = compute_dtype
        cast_linear(model, compute_dtype)
        self.device = torch.device(device)
        self.model.to(self.device)

    @property
    def num_parameters(self) -> int:
        """Of all its layers."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that run."""
        return self._layers

    def twin(self) -> "Trunk":
        """The same weights in modules of their own: two threads may run them at the same time."""
        other = copy.copy(self)
        other.model = twin_of(self.model)
        other._layers = other.model.get_submodule(self._layers_path)
        return other

    def below(self, deepest: int) -> "Trunk":
        """The same weights, run no further than to a lower state."""
        other = self.twin()
        del other._layers[max(deepest, 1) :]
        other._forms, other.deepest = self._forms[: len(other._layers)], deepest
        return other

    @torch.inference_mode()
    def run(
        self,
        tokens: Int[Tensor, "sequence position"],
        position_ids: Int[Tensor, "sequence position"],
        *,
        hidden: Sink | None = None,
        attention: Sink | None = None,
    ) -> None:
        """One forward pass; `hidden(l, h[l])` and `attention(l, a[l])` are called as layers finish.

        `h[l]` is the residual stream entering layer `l`, and `h[L]` leaves the last layer, before
        the final norm. Attention stays inside segments: position ids restart with each.

        `hidden`, `attention`: what takes states and attention outputs. A layer without an attention branch
        gives none.
        `position_ids`: they are looked at: on a GPU it would be waited for, on the processor nobody waits.
        """
        if self._are_apart(position_ids):
            self._run_apart(tokens, position_ids, hidden, attention)
            return
        several = bool((position_ids[:, 1:] == 0).any())
        hooks = capture.hooks(self._layers, self._forms, self.deepest, hidden, attention)
        with hooks, known_segments(self.device, several=several):
            self._forward(tokens, position_ids)

    def _are_apart(self, position_ids: Tensor) -> bool:
        """Whether segments are run one by one; of most models nothing is asked of the device."""
        if not (self.apart or self._by_length) or not (position_ids[:, 1:] == 0).any():
            return False
        structure = structure_of(self.teacher.config)
        return self.apart or structure.looks_at_length(int(position_ids.max()) + 1)

    def _forward(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> Any:
        places = {"position_ids": move(position_ids, self.device)} if self._takes_positions else {}
        with autocast(self.device, self.compute_dtype):
            return self.model(input_ids=tokens.to(self.device), use_cache=False, **places, **options)

    def _run_apart(
        self, tokens: Tensor, position_ids: Tensor, hidden: Sink | None, attention: Sink | None
    ) -> None:
        """Segment by segment, those of equal places together; what was captured is put together again."""
        kept: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for (start, stop), rows in spans_of(position_ids).items():

            def keep(
                layer: int, state: Tensor, into: dict[int, Tensor], at: Any = (rows, slice(start, stop))
            ) -> None:
                if layer not in into:
                    into[layer] = state.new_zeros(*tokens.shape, state.shape[-1])
                into[layer][at] = state

            sinks = [partial(keep, into=each) for each in kept]
            with capture.hooks(self._layers, self._forms, self.deepest, sinks[0], sinks[1]):
                self._forward(tokens[rows, start:stop], position_ids[rows, start:stop])
        for sink, states in zip((hidden, attention), kept, strict=True):
            if sink is not None:
                for layer, state in sorted(states.items()):
                    sink(layer, state)


def twin_of(module: Module) -> Module:
    """A copy that shares all weights and buffers; hooks on one do not see what the other computes."""
    shared: dict[int, Any] = {id(each): each for each in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _base(teacher: Teacher, deepest: int) -> Any:
    """The base model with its first layers, from the checkpoint's single tensors."""
    structure = structure_of(teacher.config)
    with quiet_transformers():
        model = meta_model.build(teacher.config, structure.implementation)
    layers = model.get_submodule(structure.path)
    del layers[max(deepest, 1) :]
    base = model.base_model
    names = {name: structure.base_prefix + name for name in base.state_dict()}
    tensors = teacher.checkpoint.read(list(names.values()))
    base.load_state_dict({name: tensors[source] for name, source in names.items()}, assign=True)
    meta_model.materialise_buffers(model, base)
    return base


# --- The teacher's own predictions: final norm and LM head on its last state, the largest logits kept.

#: Called with an array's name in the store, the layer (None for logits), and a batch of it.
Put = Callable[[str, int | None, Tensor], None]

#: Logits of one piece of work are held at once: 64 MiB, of a vocabulary of 50,000 for 320 positions.
PIECE_LOGITS = 2**24


class Head:
    """From the last state `h[L]`, before the final norm, to the largest next-token logits.

    It computes in float32 whatever the trunk computes in: a bfloat16 logit of 20 is a multiple of
    1/8, which is coarser than what a student is to learn from it.
    """

    def __init__(self, teacher: Teacher, count: int, device: str = "cpu") -> None:
        self._tail = Tail(teacher, teacher.num_layers).to(device)
        self._count = count
        self._piece = max(1, PIECE_LOGITS // teacher.config.vocab_size)

    @torch.inference_mode()
    def top(self, state: Float[Tensor, "sequence position feature"]) -> TopLogits:
        """The largest logits of a batch of last states, relative to the largest of each position.

        Only differences have a meaning, and those to the largest survive rounding to float16.
        """
        pieces = []
        for piece in state.flatten(0, 1).float().split(self._piece):
            logits = self._tail.logits(piece)
            values, ids = logits.topk(self._count)
            largest = values[:, :1]
            pieces.append((values - largest, ids.int(), logits.logsumexp(-1) - largest[:, 0]))
        values, ids, normaliser = (
            torch.cat(parts).unflatten(0, state.shape[:2]) for parts in zip(*pieces, strict=True)
        )
        return TopLogits(values, ids, normaliser)


def compute_batch(
    trunk: Trunk,
    head: Head | None,
    tokens: Int[Tensor, "sequence position"],
    position_ids: Int[Tensor, "sequence position"],
    put: Put,
    batch_sequences: int | None = None,
) -> None:
    """Everything that a store holds of a batch: states and attention outputs as they come, then logits.

    `batch_sequences`: sequences of which logits are computed at once; left out, all.
    """
    last: list[Tensor] = []

    def hidden(layer: int, state: Tensor) -> None:
        put("hidden", layer, state)
        if head and layer == trunk.deepest:
            last.append(state)

    def attention(layer: int, context: Tensor) -> None:
        put("attention", layer, context)

    trunk.run(tokens, position_ids, hidden=hidden, attention=attention)
    if head:
        parts_of = last[0].split(batch_sequences or len(tokens))
        with Lanes.on(trunk.device, len(parts_of)) as lanes:
            found = list(lanes.map(lambda _, state: head.top(state), parts_of))
        for name, *parts in zip(TopLogits._fields, *found, strict=True):
            put(f"logit_{name}", None, torch.cat(parts) if len(parts) > 1 else parts[0])


# --- A trunk that holds one layer at a time: for teachers that are larger than the memory.
#
# Each layer is read from the checkpoint, run over all sequences of a call, and let go. That pays where a
# call has many tokens: reading is shared by them.


def load_trunk(
    teacher: Teacher, deepest: int, compute_dtype: torch.dtype, device: str, stream: int | None = None
) -> Trunk:
    """The layers below state `deepest`; with `stream`, one at a time, each run over so many sequences."""
    if stream is None:
        return Trunk(teacher, deepest, compute_dtype, device)
    return StreamedTrunk(teacher, deepest, compute_dtype, device, batch_sequences=stream)


class StreamedTrunk(Trunk):
    """Does what `Trunk` does, with one layer in memory.

    `compute_dtype`: `torch.bfloat16` runs matrix products in it and keeps the residual stream in float32.
    `batch_sequences`: sequences of one pass through a layer. Passes are the same as without streaming, so are
    the results.
    Raises `TeacherError` if a layer of the teacher cannot be run alone.
    """

    def __init__(
        self,
        teacher: Teacher,
        deepest: int,
        compute_dtype: torch.dtype,
        device: str = "cpu",
        *,
        batch_sequences: int,
    ) -> None:
        self.teacher, self.deepest, self.compute_dtype = teacher, deepest, compute_dtype
        self.device = torch.device(device)
        self._batch_sequences = batch_sequences
        # The constructor above is not called, since it would load all layers. This small trunk is tried as
        # every other is, and makes h[0] of tokens.
        self._start = Trunk(teacher, 0, compute_dtype, device)
        self._frame = load_rotary(teacher).to(self.device)

    @property
    def num_parameters(self) -> int:
        """Of what is in memory between two layers."""
        return self._start.num_parameters

    @torch.inference_mode()
    def run(
        self,
        tokens: Int[Tensor, "sequence position"],
        position_ids: Int[Tensor, "sequence position"],
        *,
        hidden: Sink | None = None,
        attention: Sink | None = None,
    ) -> None:
        """One forward pass; `hidden(l, h[l])` and `attention(l, a[l])` are called as layers finish."""
        rows = [
            slice(first, first + self._batch_sequences)
            for first in range(0, len(tokens), self._batch_sequences)
        ]
        places = position_ids.to(self.device)
        states = torch.cat([self._embed(tokens[each], position_ids[each]) for each in rows])
        if hidden:
            hidden(0, states)
        with Lanes.on(self.device, len(rows)) as lanes:
            for index in range(self.deepest):
                layer = load_layer(self.teacher, index)
                cast_linear(layer, self.compute_dtype)
                layer.to(self.device)
                own = [layer, *(twin_of(layer) for _ in range(lanes.count - 1))]

                @torch.inference_mode()  # which is a thread's own, too
                def run_some(lane: int, each: slice, own: list[Branches] = own) -> list[Tensor]:
                    outputs: list[Tensor] = []
                    context = attention_context(self._frame, places[each])
                    states[each] = self._pass(own[lane], states[each], context, outputs)
                    return outputs

                outputs = [output for found in lanes.map(run_some, rows) for output in found]
                if attention and outputs:
                    attention(index, torch.cat(outputs))
                if hidden:
                    hidden(index + 1, states)

    def _embed(self, tokens: Tensor, position_ids: Tensor) -> Float[Tensor, "sequence position feature"]:
        found: list[Tensor] = []
        self._start.run(tokens, position_ids, hidden=lambda _, state: found.append(state.float()))
        return found[0]

    def _pass(
        self, layer: Branches, states: Tensor, context: AttentionContext, outputs: list[Tensor]
    ) -> Float[Tensor, "sequence position feature"]:
        """One layer over some of the sequences; its attention outputs are kept beside."""
        keep = partial(_keep, into=outputs)
        own = nn.ModuleList([layer.layer])
        hooks = capture.hooks(own, [layer.form], 0, None, None if context.apart else keep)
        with autocast(self.device, self.compute_dtype), hooks:
            if context.apart:
                return layer(states, context)
            return layer.own(states, context)


def _keep(_index: int, state: Tensor, into: list[Any]) -> None:
    into.append(state.clone())
