"""What healing minimises: a student's next-token distributions against the teacher's, or the tokens."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lftpipe.base.device import cast_linear
from lftpipe.base.errors import RunError
from lftpipe.config.loss import ON_STORED_LOGITS
from lftpipe.config.settings import HealSettings
from lftpipe.data.batches import Batch, BatchFields, BatchOrder, BatchReader
from lftpipe.families.attention import AttentionContext
from lftpipe.flow.distillation import full_divergence, next_token_loss
from lftpipe.flow.path import States
from lftpipe.store import Store
from lftpipe.teacher.layers import load_embedding
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail
from lftpipe.training.healing import Healing
from lftpipe.training.terms import check_head, on_sampled_logits, on_top_logits, over_pieces

#: From states at the student's start, and their context, to what the head reads.
Student = Callable[[States, AttentionContext], States]


def prepare_healing(
    folder: Path,
    settings: HealSettings,
    store: Store,
    teacher: Teacher,
    student: Student,
    start: int,
    trained: dict[str, nn.Parameter],
    healed: str,
) -> Healing:
    """The healing of a student, before its first step."""
    dtype = getattr(torch, settings.compute_dtype)
    reader = BatchReader(store, teacher, settings.device)
    embedding = None if start in store.layers else load_embedding(teacher).to(settings.device)
    layers = {start} if embedding is None else set()
    # The teacher's own last layers and head; those that heal are others.
    deepest = max(store.layers) if settings.loss == "logits" else teacher.num_layers
    if settings.loss == "logits":
        layers.add(deepest)
    tail = Tail(teacher, deepest)
    tail.to(settings.device)
    cast_linear(tail, dtype)
    if settings.loss == "sampled-logits":
        check_head(tail, teacher)
    held_back = math.ceil(settings.hold_back * store.num_sequences("train"))
    used = store.num_sequences("train") - held_back
    if used < 1:
        raise RunError(f"--hold-back {settings.hold_back:g} of all sequences", "some left", "lower it")
    autocast = partial(
        torch.autocast, torch.device(settings.device).type, torch.bfloat16, enabled=dtype == torch.bfloat16
    )

    def loss(batch: Batch) -> Tensor:
        with autocast():
            x = batch.states[start] if embedding is None else embedding(batch.tokens)
            return _LOSSES[settings.loss](student(x, batch.context), batch, tail)

    return Healing(
        folder,
        settings,
        reader,
        BatchFields(tuple(sorted(layers)), logits=settings.loss in ON_STORED_LOGITS),
        BatchOrder(max(1, settings.batch_tokens // store.context), settings.seed, used),
        trained,
        loss,
        healed,
    )


def _top_logits(states: Tensor, batch: Batch, tail: Tail) -> Tensor:
    return over_pieces(states, on_top_logits(tail, batch))


def _sampled_logits(states: Tensor, batch: Batch, tail: Tail) -> Tensor:
    return over_pieces(states, on_sampled_logits(tail, batch))


def _logits(states: Tensor, batch: Batch, tail: Tail) -> Tensor:
    with torch.no_grad():
        h = tail.states(batch.states[tail.start], batch.context)
        theirs = tail.norm(h).flatten(0, 1)

    def compare(piece: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            teacher = tail.head(theirs[part])
        return full_divergence(teacher, tail.head(piece))

    return over_pieces(states, (compare, tail.vocabulary))


def _tokens(states: Tensor, batch: Batch, tail: Tail) -> Tensor:
    following = batch.tokens.roll(-1, dims=1).flatten()
    known = ~batch.first_of_segment.roll(-1, dims=1)
    known[:, -1] = False
    targets = known.flatten()

    def compare(piece: Tensor, part: slice) -> Tensor:
        return next_token_loss(following[part], targets[part], tail.head(piece))

    return over_pieces(states, (compare, tail.vocabulary))


_LOSSES = {
    "top-logits": _top_logits,
    "sampled-logits": _sampled_logits,
    "logits": _logits,
    "tokens": _tokens,
}
