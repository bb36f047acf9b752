"""States that the teacher computes for each batch (`--from-teacher`): the yardstick for the cache."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from lftpipe.data.batches import Batch, BatchFields, BatchOrder, BatchReader
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher

if TYPE_CHECKING:
    from lftpipe.teacher.trunk import Trunk


class LiveTeacher:
    """Computes the states of batches; its trunk is loaded once for all that ask for the same states."""

    def __init__(self, teacher: Teacher, compute_dtype: torch.dtype, device: str | torch.device) -> None:
        self._teacher, self._dtype, self._device = teacher, compute_dtype, str(device)
        self._trunks: dict[int, Trunk] = {}  # by depth, with the weights of the deepest

    def fill(self, batch: Batch, fields: BatchFields) -> Batch:
        """The batch with the states that the teacher computes for it."""
        states: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor) -> None:
            if layer in fields.layers:
                states[layer] = state.float()

        def keep_attention(layer: int, output: Tensor) -> None:
            if layer in fields.attention:
                attention[layer] = output.float()

        deepest = max(*fields.layers, *(layer + 1 for layer in fields.attention), 0)
        self._trunk_to(deepest).run(
            batch.tokens,
            batch.visible_places,
            hidden=keep,
            attention=keep_attention if fields.attention else None,
        )
        # Tensors of inference mode can't take part in autograd; a clone outside of it can.
        copies = ({layer: state.clone() for layer, state in each.items()} for each in (states, attention))
        return replace(batch, **dict(zip(("states", "attention"), copies, strict=True)))

    def _trunk_to(self, deepest: int) -> "Trunk":
        """The teacher below a state; it is loaded again only if a deeper state is asked for than before."""
        from lftpipe.teacher.trunk import Trunk  # training from the cache never imports it

        if max(self._trunks, default=-1) < deepest:
            self._trunks.clear()  # before another takes as much memory
            self._trunks[deepest] = Trunk(self._teacher, deepest, self._dtype, self._device)
        if deepest not in self._trunks:
            self._trunks[deepest] = self._trunks[max(self._trunks)].below(deepest)
        return self._trunks[deepest]


class LiveReader(BatchReader):
    """Gives the batches that a `BatchReader` gives, with states that are computed and not read.

    Of the store it reads tokens, and logits if wanted: a store without states will do. The teacher's pass is
    shared by all runs that are trained on a batch.

    `teacher`: the store's; its trunk runs as it did at extraction.
    """

    def __init__(self, store: Store, teacher: Teacher, device: str | torch.device) -> None:
        super().__init__(store, teacher, device)
        self._live = LiveTeacher(teacher, getattr(torch, store.identity["compute_dtype"]), device)

    @override
    def read(self, split: str, sequences: range, fields: BatchFields, step: int = 0) -> Batch:
        return self._live.fill(super().read(split, sequences, _without_states(fields), step), fields)

    @override
    def shuffled(self, fields: BatchFields, order: BatchOrder, start_step: int) -> Iterator[Batch]:
        for batch in super().shuffled(_without_states(fields), order, start_step):
            yield self._live.fill(batch, fields)


def _without_states(fields: BatchFields) -> BatchFields:
    return BatchFields(logits=fields.logits)


def reader_of(store: Store, teacher: Teacher, device: str, *, live: bool) -> BatchReader:
    """What gives the batches of training and of scoring."""
    return (LiveReader if live else BatchReader)(store, teacher, device)


def states_at_hand(store: Store, teacher: Teacher) -> tuple[int, ...]:
    """The states of a store; of one that holds tokens alone, all that the teacher can compute."""
    return store.layers or tuple(range(teacher.num_layers + 1))
