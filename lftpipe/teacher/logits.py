"""The teacher's own predictions: final norm and LM head on its last state, the largest logits kept."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lftpipe.teacher.lanes import Lanes
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail, TopLogits
from lftpipe.teacher.trunk import Trunk

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
        """The largest logits of a batch of last states."""
        pieces = []
        for piece in state.flatten(0, 1).float().split(self._piece):
            logits = self._tail.logits(piece)
            values, ids = logits.topk(self._count)
            pieces.append((values, ids.int(), logits.logsumexp(-1)))
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

    Parameters
    ----------
    batch_sequences
        Sequences of which logits are computed at once; left out, all.
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
