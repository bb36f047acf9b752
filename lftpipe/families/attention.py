"""Attention: what a layer needs to know of its batch, and torch's attention in blocks of queries."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# --- What attention needs to know of a batch: positions, and who sees whom.

#: What a layer is called with beside its states, by name.
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionContext:
    """What layers need to know of a batch beside its states: positions and who sees whom."""

    position_ids: Int[Tensor, "#sequence position"]
    layers: Mapping[int, Arguments]
    """What each layer is called with: masks, rotary embeddings, a cache."""
    again: "Callable[[Tensor], AttentionContext] | None" = None
    """Makes the context of other position ids."""
    apart: bool = False
    """Whether segments must be run one by one, since the layers would not keep them apart."""

    def rows(self, rows: slice) -> "AttentionContext":
        """Of some of the sequences."""
        assert self.again is not None, "a context without a frame"
        return self.again(self.position_ids[rows] if len(self.position_ids) > 1 else self.position_ids)

    def to(self, device: torch.device) -> "AttentionContext":
        """The same on another device; position ids stay where they can be looked at without waiting."""
        if device.type == "cpu":
            return self
        moved: dict[int, Tensor] = {}  # layers share their tensors

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return moved.setdefault(id(value), value.to(device, non_blocking=True))
            if isinstance(value, tuple | list):
                return type(value)(map(move, value))
            return {name: move(each) for name, each in value.items()} if isinstance(value, dict) else value

        again = self.again
        return replace(
            self,
            layers={index: move(dict(each)) for index, each in self.layers.items()},
            again=None if again is None else lambda places: again(places).to(device),
        )

    def segments(self) -> "list[tuple[Tensor, slice, AttentionContext]]":
        """Rows, positions and context of each run of equal segments, where they are run one by one."""
        assert self.again is not None, "a context without a frame"
        parts = []
        for (start, stop), rows in spans_of(self.position_ids).items():
            context = self.again(self.position_ids[rows, start:stop])
            parts.append((torch.tensor(rows, device=self.position_ids.device), slice(start, stop), context))
        return parts


def spans_of(position_ids: Int[Tensor, "sequence position"]) -> dict[tuple[int, int], list[int]]:
    """The rows that have a segment there, by its start and stop."""
    spans: dict[tuple[int, int], list[int]] = {}
    for row, places in enumerate(position_ids):
        starts = (places == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
            spans.setdefault((start, stop), []).append(row)
    return spans


def attention_context(frame: nn.Module, position_ids: Int[Tensor, "sequence position"]) -> AttentionContext:
    """The context of packed sequences, from position ids that restart with each segment.

    `frame`: what `Family.frame` made: the model around its layers.

    Returns
    -------
    AttentionContext
        Plain causal attention where every sequence is one segment, which has faster kernels; else
        masks that keep attention inside the segment, or segments that are run one by one.
    """
    return frame.context(position_ids)  # pyright: ignore[reportCallIssue]


@contextmanager
def known_segments(device: torch.device, *, several: bool) -> Iterator[None]:
    """Spare transformers' masks a look at the position ids of a GPU, which is to wait for it.

    On a processor, where several threads may run models, there is nothing to wait for.

    `several`: whether a sequence has more than one segment.
    """
    if device.type == "cpu":
        yield
        return
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda places: (places == 0).cumsum(-1) if several else None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


# --- Attention of the teacher's layers where they are trained on a processor in bfloat16.
#
# torch's fused kernel for processors multiplies bfloat16 in small tiles and, where sequences are short,
# skips nothing of what causality hides: forward and backward take twice the time of plain products of
# blocks.

#: What layers built from a teacher's config call it (`_attn_implementation`).
NAME = "lftpipe"

#: Options that attention in blocks heeds, or that are in its mask. It does not know others, such as a window.
KNOWN = {"scaling", "dropout", "position_ids", "use_cache"}

#: Queries of one product. Half of it or twice is slower or no faster, at contexts of 256 to 512.
BLOCK = 128

Queries = Float[Tensor, "sequence head position feature"]
Keys = Float[Tensor, "sequence key_head key feature"]
Mask = Shaped[Tensor, "#sequence 1 position key"] | None


def attention(
    module: nn.Module, query: Queries, key: Keys, value: Keys, attention_mask: Mask, **options: Any
) -> tuple[Float[Tensor, "sequence position head feature"], None]:
    """Attention as transformers' layers call it: in blocks where that is faster."""
    if _in_blocks(query, key, options):
        return causal_attention(query, key, value, attention_mask, options.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _in_blocks(query: Queries, key: Keys, options: dict[str, Any]) -> bool:
    if query.device.type != "cpu":
        return False
    in_bfloat16 = query.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    whole = 1 < query.shape[2] == key.shape[2]  # not the next tokens after a cache
    usual = not options.get("dropout") and all(options[name] is None for name in options.keys() - KNOWN)
    return in_bfloat16 and whole and usual


def causal_attention(
    query: Queries, key: Keys, value: Keys, mask: Mask = None, scaling: float | None = None
) -> Float[Tensor, "sequence position head feature"]:
    """Causal attention in bfloat16, `BLOCK` queries at a time, which see the keys up to their own last one.

    `query`: of as many heads as `key` and `value` have, or a multiple (grouped queries).
    `mask`: true where a query sees a key, or what to add to the scores; None hides later keys alone. Later
    keys are hidden in any case.
    `scaling`: of the scores; `1 / sqrt(feature)` if left out.
    """
    sequences, heads, positions, features = query.shape
    groups = heads // key.shape[1]
    scale: float = features**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(torch.bfloat16).unflatten(1, (-1, groups))
        k, v = (x.to(torch.bfloat16).flatten(0, 1) for x in (key, value))
        added = _added(mask, positions, query.device)
        blocks = []
        for start in range(0, positions, BLOCK):
            stop = min(start + BLOCK, positions)
            # Queries of a group see the same keys: they are rows of one product.
            rows = q[:, :, :, start:stop].flatten(0, 1).flatten(1, 2)
            hidden = added[:, None, None, start:stop, :stop]
            hidden = hidden.expand(sequences, heads // groups, groups, -1, -1).flatten(0, 1).flatten(1, 2)
            scores = torch.baddbmm(hidden, rows, k[:, :stop].transpose(1, 2), alpha=scale)
            blocks.append((scores.softmax(-1) @ v[:, :stop]).unflatten(1, (groups, -1)))
        out = torch.cat(blocks, dim=2).unflatten(0, (sequences, -1)).flatten(1, 2)
    return out.transpose(1, 2)


def _added(mask: Mask, positions: int, device: torch.device) -> Shaped[Tensor, "#sequence position key"]:
    """What to add to the scores: minus infinity where a key is hidden."""
    later = torch.full((positions, positions), -torch.inf, dtype=torch.bfloat16, device=device).triu(1)[None]
    if mask is None:
        return later
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    return mask.to(torch.bfloat16).squeeze(1) + later


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
