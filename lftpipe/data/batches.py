"""A batch of packed sequences on the device, as training, hold-out, scoring and extraction all see it.

`make_batch` is the one place where the documents of a sequence become position ids, and these what attention
needs to know. Nothing downstream looks at a document again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn

from lftpipe.base.device import CopyStream, move
from lftpipe.corpus.packing import positions
from lftpipe.families.attention import AttentionContext, attention_context
from lftpipe.store import Batch as StoredBatch
from lftpipe.store import Store
from lftpipe.teacher.layers import load_rotary
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import TopLogits

States = Float[Tensor, "sequence position feature"]
#: A slice is not hashable before Python 3.12, and so no default of a dataclass.
_ALL = slice(None)

Rows = Int32[np.ndarray, "sequence position"]


@dataclass(frozen=True)
class BatchFields:
    """What of a store a batch holds beside its tokens."""

    layers: tuple[int, ...] = ()
    """States `h[l]`."""
    attention: tuple[int, ...] = ()
    """Layers whose attention outputs `a[l]` it holds."""
    logits: bool = False
    """The teacher's largest logits."""

    def __or__(self, other: "BatchFields") -> "BatchFields":
        layers, attention = (
            tuple(sorted({*mine, *theirs}))
            for mine, theirs in ((self.layers, other.layers), (self.attention, other.attention))
        )
        return BatchFields(layers, attention, self.logits or other.logits)


@dataclass(frozen=True)
class BatchOrder:
    """Which sequences of the training split a step sees: a function of seed and step."""

    batch_size: int
    """Sequences in a batch, over all processes."""
    seed: int
    num_sequences: int
    """Of the split, from its first."""
    part: slice = field(default_factory=lambda: _ALL)
    """Of each batch: what this process takes."""
    window: int = 0
    """Sequences that are shuffled among themselves; 0: all."""


@dataclass(frozen=True)
class Batch:
    """Some sequences of a split, and what is known of them. All tensors are on one device."""

    step: int
    """The batch's number, of which all random draws of a step are a function."""
    tokens: Int[Tensor, "sequence position"]
    position_ids: Int[Tensor, "sequence position"]
    """They restart at 0 with each segment: a document's part of a sequence."""
    states: Mapping[int, States] = field(default_factory=dict)
    """`h[l]` by layer, in float32."""
    attention: Mapping[int, States] = field(default_factory=dict)
    """`a[l]` by layer, in float32."""
    logits: TopLogits | None = None
    part: slice = field(default_factory=lambda: _ALL)
    """Which of a whole batch's sequences these are: of the random draws, they take the same."""
    rotary: nn.Module | None = None
    """What `context` is made with; None where only the whole teacher runs, which makes its own."""
    places: Int[Tensor, "sequence position"] | None = None
    """The position ids where they can be looked at without waiting for a device."""
    num_consumers: int = 1
    """Runs that are trained on it."""
    document: Rows | None = None
    """The number of the document that each token came from; on the processor, for statistics alone."""
    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """What one of several runs computed of it and the others will need too."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def first_of_segment(self) -> Bool[Tensor, "sequence position"]:
        """Where a segment begins. Massive activations sit there, and no token before it is seen."""
        return self.position_ids == 0

    def need(self, fields: BatchFields) -> None:
        """Refuse to go on without these fields: what looks at others instead has other results.

        Raises `LookupError` naming what is missing.
        """
        missing = [f"h[{layer}]" for layer in fields.layers if layer not in self.states]
        missing += [f"a[{layer}]" for layer in fields.attention if layer not in self.attention]
        missing += ["the teacher's logits"] if fields.logits and self.logits is None else []
        if missing:
            raise LookupError(f"batch {self.step} was read without {', '.join(missing)}")

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        yield from (self.tokens, self.position_ids, *self.states.values(), *self.attention.values())
        yield from self.logits or ()

    @cached_property
    def context(self) -> AttentionContext:
        """What attention needs to know of these sequences: positions, and who sees whom."""
        assert self.rotary is not None, "this batch is for the whole teacher"
        return attention_context(self.rotary, self.visible_places).to(self.tokens.device)

    @property
    def visible_places(self) -> Int[Tensor, "sequence position"]:
        """The position ids, on the processor if they are there too."""
        return self.position_ids if self.places is None else self.places


def make_batch(
    tokens: Rows,
    document: Rows,
    device: torch.device,
    rotary: nn.Module | None = None,
    *,
    step: int = 0,
    part: slice = _ALL,
    states: Mapping[int, States] | None = None,
    attention: Mapping[int, States] | None = None,
    logits: Sequence[np.ndarray] | None = None,
) -> Batch:
    """The batch of these sequences.

    `document`: the number of the document that each token came from.
    `rotary`: of the teacher, on the processor; left out, the batch has no `context`.
    """
    places = torch.from_numpy(positions(document)).long()
    return Batch(
        step=step,
        tokens=move(torch.from_numpy(tokens).long(), device),
        position_ids=move(places, device),
        states=states or {},
        attention=attention or {},
        logits=TopLogits(*(move(torch.from_numpy(each), device) for each in logits)) if logits else None,
        part=part,
        rotary=rotary,
        places=places,
        document=document,
    )


class BatchReader:
    """Batches of one store on one device.

    `teacher`: the store's; of it only the frame around its layers is made.
    `say`: takes a line when a shard of a rolling store is waited for.
    """

    def __init__(self, store: Store, teacher: Teacher, device: str | torch.device) -> None:
        self.store, self.device = store, torch.device(device)
        self.rotary = load_rotary(teacher)
        self.copies = CopyStream(self.device)
        self.say: Callable[[str], object] = print

    def read(self, split: str, sequences: range, fields: BatchFields, step: int = 0) -> Batch:
        """Some sequences of a split."""
        states, attention = (
            {layer: self._put(self.store.read(split, layer, sequences, array=array)) for layer in layers}
            for array, layers in (("hidden", fields.layers), ("attention", fields.attention))
        )
        return make_batch(
            self.store.tokens(split, sequences),
            self.store.document(split, sequences),
            self.device,
            self.rotary,
            step=step,
            part=slice(len(sequences)),
            states=states,
            attention=attention,
            logits=self.store.logits(split, sequences) if fields.logits else None,
        )

    def shuffled(self, fields: BatchFields, order: BatchOrder, start_step: int) -> Iterator[Batch]:
        """The batches of training, without end; nothing of the teacher runs.

        A thread reads ahead. To a GPU each batch is copied while the one before it is computed on, in the
        store's format, and widened there.
        """
        copies = self.copies
        read = self.store.batches(
            "train",
            fields.layers,
            batch_size=order.batch_size,
            seed=order.seed,
            start_step=start_step,
            attention_layers=fields.attention,
            num_sequences=order.num_sequences,
            part=order.part,
            with_logits=fields.logits,
            window=order.window,
            say=self.say,
            allocate=copies.allocate,
        )
        if not copies.beside:
            for stored in read:
                yield self._moved(stored, order.part)
            return
        before: tuple[Batch, Any] | None = None
        for stored in read:
            with copies.copying():
                batch = self._moved(stored, order.part)
            mark = copies.mark()
            if before is not None:
                copies.arrive(before[1], before[0].tensors())
                yield before[0]
            copies.wait(mark)  # then the reader may use its buffers again
            before = batch, mark

    def _moved(self, stored: StoredBatch, part: slice) -> Batch:
        """What was read, on the device. On a processor it is copied: the reader uses its buffers again."""
        assert stored.tokens is not None
        assert stored.document is not None
        states, attention = (
            {layer: self._put(state, copy=True) for layer, state in each.items()}
            for each in (stored.states, stored.attention)
        )
        return make_batch(
            stored.tokens,
            stored.document,
            self.device,
            self.rotary,
            step=stored.step,
            part=part,
            states=states,
            attention=attention,
            logits=stored.logits,
        )

    def _put(self, state: np.ndarray, *, copy: bool = False) -> Tensor:
        """A state in float32 on the device; to a GPU it goes as it is stored."""
        tensor = torch.from_numpy(state)
        if self.device.type == "cuda":
            return move(tensor, self.device).float()
        return tensor.to(self.device, torch.float32, copy=copy)
