"""The states that training sees: read from the store, or computed anew by the teacher."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lftpipe.corpus.packing import positions
from lftpipe.store import Batch, Store
from lftpipe.store.batches import Logits
from lftpipe.teacher.source import Teacher


@dataclass(frozen=True)
class Needs:
    """What of a store a step of training looks at."""

    layers: tuple[int, ...]
    """States `h[l]`."""
    attention: tuple[int, ...] = ()
    """Layers whose attention contexts are summed."""
    logits: bool = False
    """The teacher's largest logits."""

    def __or__(self, other: "Needs") -> "Needs":
        layers, attention = (
            tuple(sorted({*mine, *theirs}))
            for mine, theirs in ((self.layers, other.layers), (self.attention, other.attention))
        )
        return Needs(layers, attention, self.logits or other.logits)


@dataclass(frozen=True)
class Order:
    """Which sequences a step sees, and in which order: the same for every source."""

    batch_size: int
    seed: int
    num_sequences: int
    """Of the training split, from its first."""
    part: slice
    """Of each batch: what this process takes."""


class Feed(NamedTuple):
    """One step's states by layer, in float32 on the device, and which document each token is of."""

    step: int
    states: dict[int, Float[Tensor, "sequence position feature"]]
    document: Int32[np.ndarray, "sequence position"]
    attention: dict[int, Float[Tensor, "sequence position feature"]]
    logits: Logits | None


#: From the number of the first step to the steps' feeds, without end.
Source = Callable[[int], Iterator[Feed]]


def from_cache(store: Store, needs: Needs, order: Order, device: str) -> Source:
    """The store's states of these layers: nothing of the teacher runs."""

    def feeds(start_step: int) -> Iterator[Feed]:
        for batch in _batches(store, needs, order, start_step):
            # Copies: the reader's buffers are used again.
            states, attention = (
                {
                    layer: torch.from_numpy(state).to(device, torch.float32, copy=True)
                    for layer, state in each.items()
                }
                for each in (batch.states, batch.attention)
            )
            yield Feed(batch.step, states, _document(batch), attention, batch.logits)

    return feeds


def from_teacher(store: Store, teacher: Teacher, needs: Needs, order: Order, device: str) -> Source:
    """The same batches with the teacher run for each: the yardstick for the cache."""
    from lftpipe.teacher.trunk import Trunk

    recorded = getattr(torch, store.identity["compute_dtype"])
    trunk = Trunk(teacher, max(*needs.layers, *(layer + 1 for layer in needs.attention)), recorded, device)
    tokens_alone = Needs((), (), needs.logits)

    def feeds(start_step: int) -> Iterator[Feed]:
        for batch in _batches(store, tokens_alone, order, start_step):
            assert batch.tokens is not None
            states: dict[int, Tensor] = {}
            attention: dict[int, Tensor] = {}

            def keep(layer: int, state: Tensor, states: dict[int, Tensor] = states) -> None:
                if layer in needs.layers:
                    states[layer] = state.float()

            def keep_attention(layer: int, context: Tensor, kept: dict[int, Tensor] = attention) -> None:
                if layer in needs.attention:
                    kept[layer] = context.float()

            document = _document(batch)
            places = torch.from_numpy(positions(document)).long()
            trunk.run(
                torch.from_numpy(batch.tokens).long(),
                places,
                hidden=keep,
                attention=keep_attention if needs.attention else None,
            )
            # Tensors of inference mode can't take part in autograd; a clone outside of it can.
            states, attention = (
                {layer: state.clone() for layer, state in each.items()} for each in (states, attention)
            )
            yield Feed(batch.step, states, document.copy(), attention, batch.logits)

    return feeds


def _batches(store: Store, needs: Needs, order: Order, start_step: int) -> Iterator[Batch]:
    return store.batches(
        "train",
        needs.layers,
        batch_size=order.batch_size,
        seed=order.seed,
        start_step=start_step,
        attention_layers=needs.attention,
        num_sequences=order.num_sequences,
        part=order.part,
        with_logits=needs.logits,
    )


def _document(batch: Batch) -> Int32[np.ndarray, "sequence position"]:
    assert batch.document is not None
    return batch.document
