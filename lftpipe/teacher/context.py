"""What attention needs to know of a batch: positions, and who sees whom."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

#: What a layer is called with beside its states, by name.
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs to know of a batch beside its states: positions and who sees whom."""

    rotary: tuple[Tensor, Tensor]
    mask: Shaped[Tensor, "#sequence 1 position key"] | None
    """True where a query (third axis) sees a key (last axis), or what to add to the scores; None is
    plain causal attention."""
    position_ids: Int[Tensor, "#sequence position"]
    cache: Any = None
    """Where attention keeps keys and values of earlier positions, when generating."""
    layers: Mapping[int, Arguments] | None = None
    """What each layer is called with, where a family is derived; rotary and mask are then in there."""
    again: "Callable[[Tensor], AttentionContext] | None" = None
    """Makes the context of other position ids."""
    apart: bool = False
    """Whether segments must be run one by one, since the layers would not keep them apart."""

    def rows(self, rows: slice) -> "AttentionContext":
        """Of some of the sequences."""
        places = self.position_ids[rows] if len(self.position_ids) > 1 else self.position_ids
        if self.again is not None:
            return self.again(places)
        cos, sin = (part[rows] if len(part) > 1 else part for part in self.rotary)
        mask = self.mask[rows] if self.mask is not None and len(self.mask) > 1 else self.mask
        return AttentionContext((cos, sin), mask, places, self.cache)

    def segments(self) -> "list[tuple[Tensor, slice, AttentionContext]]":
        """Rows, positions and context of each run of equal segments, where they are run one by one."""
        assert self.again is not None, "a context without a frame"
        spans: dict[tuple[int, int], list[int]] = {}
        for row, places in enumerate(self.position_ids):
            starts = (places == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
                spans.setdefault((start, stop), []).append(row)
        parts = []
        for (start, stop), rows in spans.items():
            context = self.again(self.position_ids[rows, start:stop])
            parts.append((torch.tensor(rows, device=self.position_ids.device), slice(start, stop), context))
        return parts


def attention_context(
    frame: nn.Module,
    position_ids: Int[Tensor, "sequence position"],
    dtype: torch.dtype = torch.float32,
    *,
    one_segment: bool | None = None,
) -> AttentionContext:
    """The context of packed sequences, from position ids that restart with each segment.

    Parameters
    ----------
    frame
        What `Family.frame` made: a rotary module, or the model around its layers.
    one_segment
        Whether every sequence is one segment, for callers that know: to look at a GPU's position ids is to
        wait for them.

    Returns
    -------
    AttentionContext
        Plain causal attention where every sequence is one segment, which has faster kernels; else
        a mask that keeps attention inside the segment.
    """
    if hasattr(frame, "context"):
        return frame.context(position_ids)  # pyright: ignore[reportCallIssue]
    cos_sin = frame(torch.empty(0, dtype=dtype, device=position_ids.device), position_ids)
    starts = position_ids == 0
    if one_segment is None:
        one_segment = not starts[:, 1:].any()
    if one_segment:
        return AttentionContext(cos_sin, None, position_ids)
    segment = starts.cumsum(-1)
    same = segment[:, None, :, None] == segment[:, None, None, :]
    causal = torch.ones(position_ids.shape[1], position_ids.shape[1], dtype=torch.bool, device=same.device)
    return AttentionContext(cos_sin, same & causal.tril(), position_ids)
