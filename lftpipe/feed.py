"""The states that training sees: read from the store, or computed anew by the teacher."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lftpipe.packing import positions
from lftpipe.store import Batch, Store
from lftpipe.teacher.source import Teacher


class Feed(NamedTuple):
    """One step's states by layer, in float32 on the device, and which document each token is of."""

    step: int
    states: dict[int, Float[Tensor, "sequence position feature"]]
    document: Int32[np.ndarray, "sequence position"]


#: From the number of the first step to the steps' feeds, without end.
Source = Callable[[int], Iterator[Feed]]


def from_cache(store: Store, layers: tuple[int, ...], batch_size: int, seed: int, device: str) -> Source:
    """The store's states of these layers: nothing of the teacher runs."""

    def feeds(start_step: int) -> Iterator[Feed]:
        for batch in _batches(store, layers, batch_size, seed, start_step):
            # Copies: the reader's buffers are used again.
            states = {
                layer: torch.from_numpy(state).to(device, torch.float32, copy=True)
                for layer, state in batch.states.items()
            }
            yield Feed(batch.step, states, _document(batch))

    return feeds


def from_teacher(
    store: Store, teacher: Teacher, layers: tuple[int, ...], batch_size: int, seed: int, device: str
) -> Source:
    """The same batches with the teacher run for each: the yardstick for the cache."""
    from lftpipe.teacher.trunk import Trunk

    recorded = getattr(torch, store.identity["compute_dtype"])
    trunk = Trunk(teacher, max(layers), recorded, device)

    def feeds(start_step: int) -> Iterator[Feed]:
        for batch in _batches(store, (), batch_size, seed, start_step):
            assert batch.tokens is not None
            states: dict[int, Tensor] = {}

            def keep(layer: int, state: Tensor, states: dict[int, Tensor] = states) -> None:
                if layer in layers:
                    states[layer] = state.float()

            document = _document(batch)
            places = torch.from_numpy(positions(document)).long()
            trunk.run(torch.from_numpy(batch.tokens).long(), places, hidden=keep)
            # Tensors of inference mode can't take part in autograd; a clone outside of it can.
            yield Feed(batch.step, {layer: state.clone() for layer, state in states.items()}, document.copy())

    return feeds


def _batches(
    store: Store, layers: tuple[int, ...], batch_size: int, seed: int, start_step: int
) -> Iterator[Batch]:
    return store.batches("train", layers, batch_size=batch_size, seed=seed, start_step=start_step)


def _document(batch: Batch) -> Int32[np.ndarray, "sequence position"]:
    assert batch.document is not None
    return batch.document
