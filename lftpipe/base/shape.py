"""What a student is made of: the parts that replace layers of its teacher. No torch.

A shape is a list of parts in order; layers that no part names stay the teacher's. It is written into a run's
manifest and into the config of an export, and shown as a short text such as `4:11>2, 12:20>2` or `each@0.5`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["flow", "layer", "layers", "linear", "skip"]
KINDS = ("flow", "layer", "layers", "linear", "skip")

#: Blocks of one student that a table or a page names, at most.
SHOWN_BLOCKS = 4

#: MLPs have a multiple of so many channels, and at least as many.
CHANNELS = 64


@dataclass(frozen=True)
class Part:
    """Layers `start .. stop-1` of the teacher, and what replaces them."""

    start: int
    stop: int
    kind: Kind = "flow"
    """A `flow` is run in steps; a `layer` or a `linear` map once; `layers` are `depth` of them, run `loops`
    times in a row; `skip` leaves nothing."""
    shift: bool = False
    """Whether the flow's modulation predicts shifts."""
    source: bool = False
    """Whether the flow sees the block's input too."""
    step: bool = False
    """Whether the flow knows the size of its steps."""
    depth: int = 1
    loops: int = 1
    width: float = 1.0
    """Fraction of the channels of the teacher's MLP."""

    @property
    def block(self) -> tuple[int, int]:
        """The layers that are replaced, half-open."""
        return self.start, self.stop

    @property
    def layers(self) -> int:
        """Layers that have weights, in place of `stop - start` of the teacher's."""
        return 0 if self.kind in ("linear", "skip") else self.depth

    def to_json(self) -> dict[str, Any]:
        """As configs and manifests have it."""
        return asdict(self)


def channels_of(width: float, channels: int) -> int:
    """Channels of an MLP of that width: the next multiple of 64, but no more than the teacher's."""
    return min(channels, CHANNELS * max(1, math.ceil(round(width * channels) / CHANNELS)))


def shape_text(parts: Sequence[Part], num_layers: int) -> str:
    """A shape as tables show it: `each@0.5` where all layers are alike, else part by part."""
    alike = {_replacement(part) for part in parts}
    each = [part.block for part in parts] == [(index, index + 1) for index in range(num_layers)]
    if each and len(alike) == 1:
        return "each" + alike.pop().removeprefix(">1")
    return ", ".join(f"{part.start}:{part.stop}{_replacement(part)}" for part in parts)


def _replacement(part: Part) -> str:
    if part.kind in ("flow", "linear", "skip"):
        text = f">{part.kind}"
    else:
        text = f">{part.depth}" + (f"x{part.loops}" if part.loops > 1 else "")
    return text + (f"@{part.width:g}" if part.width != 1 else "")


def num_layers_of(parts: Sequence[Part], num_layers: int) -> int:
    """Layers of a student, each of which has weights of its own."""
    return num_layers - sum(part.stop - part.start - part.layers for part in parts)
