"""Batches for which the teacher runs anew (`--from-teacher`): the yardstick for the cache."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lftpipe.batch import Batch, BatchFields, BatchOrder, BatchReader
from lftpipe.teacher.source import Teacher


def live_batches(
    reader: BatchReader, teacher: Teacher, fields: BatchFields, order: BatchOrder, start_step: int
) -> Iterator[Batch]:
    """The batches that `reader.shuffled` gives, with states that the teacher computes for each.

    Parameters
    ----------
    reader
        Where tokens, and logits if wanted, are read.
    teacher
        The store's; its trunk runs as it did at extraction.
    fields
        What a batch holds.
    order
        Which sequences each batch holds.
    start_step
        The first batch's number.
    """
    from lftpipe.teacher.trunk import Trunk

    recorded = getattr(torch, reader.store.identity["compute_dtype"])
    deepest = max(*fields.layers, *(layer + 1 for layer in fields.attention))
    trunk = Trunk(teacher, deepest, recorded, str(reader.device))
    for batch in reader.shuffled(BatchFields(logits=fields.logits), order, start_step):
        states: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor, kept: dict[int, Tensor] = states) -> None:
            if layer in fields.layers:
                kept[layer] = state.float()

        def keep_attention(layer: int, output: Tensor, kept: dict[int, Tensor] = attention) -> None:
            if layer in fields.attention:
                kept[layer] = output.float()

        trunk.run(
            batch.tokens,
            batch.position_ids,
            hidden=keep,
            attention=keep_attention if fields.attention else None,
        )
        # Tensors of inference mode can't take part in autograd; a clone outside of it can.
        states, attention = (
            {layer: state.clone() for layer, state in each.items()} for each in (states, attention)
        )
        yield replace(batch, states=states, attention=attention)
