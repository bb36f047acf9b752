"""A trunk that holds one layer at a time: for teachers that are larger than the memory.

Each layer is read from the checkpoint, run over all sequences of a call, and let go. That pays where a call
has many tokens: reading is shared by them.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lftpipe.device import cast_linear
from lftpipe.teacher import capture
from lftpipe.teacher.branches import Branches
from lftpipe.teacher.capture import Sink
from lftpipe.teacher.context import AttentionContext, attention_context
from lftpipe.teacher.lanes import Lanes
from lftpipe.teacher.parts import load_layer, load_rotary
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.trunk import Trunk, twin_of


class StreamedTrunk(Trunk):
    """Does what `Trunk` does, with one layer in memory.

    Parameters
    ----------
    compute_dtype
        `torch.bfloat16` runs matrix products in it and keeps the residual stream in float32.
    batch_sequences
        Sequences of one pass through a layer. Passes are the same as without streaming, so are the results.

    Raises
    ------
    TeacherError
        If a layer of the teacher cannot be run alone.
    """

    def __init__(
        self,
        teacher: Teacher,
        deepest: int,
        compute_dtype: torch.dtype,
        device: str = "cpu",
        *,
        batch_sequences: int,
    ) -> None:
        self.teacher, self.deepest, self.compute_dtype = teacher, deepest, compute_dtype
        self.device = torch.device(device)
        self._batch_sequences = batch_sequences
        # The constructor above is not called, since it would load all layers. This small trunk is tried as
        # every other is, and makes h[0] of tokens.
        self._start = Trunk(teacher, 0, compute_dtype, device)
        self._frame = load_rotary(teacher).to(self.device)

    @property
    def num_parameters(self) -> int:
        """Of what is in memory between two layers."""
        return self._start.num_parameters

    @torch.inference_mode()
    def run(
        self,
        tokens: Int[Tensor, "sequence position"],
        position_ids: Int[Tensor, "sequence position"],
        *,
        hidden: Sink | None = None,
        attention: Sink | None = None,
    ) -> None:
        """One forward pass; `hidden(l, h[l])` and `attention(l, a[l])` are called as layers finish."""
        rows = [
            slice(first, first + self._batch_sequences)
            for first in range(0, len(tokens), self._batch_sequences)
        ]
        places = position_ids.to(self.device)
        states = torch.cat([self._embed(tokens[each], position_ids[each]) for each in rows])
        if hidden:
            hidden(0, states)
        with Lanes.on(self.device, len(rows)) as lanes:
            for index in range(self.deepest):
                layer = load_layer(self.teacher, index)
                cast_linear(layer, self.compute_dtype)
                layer.to(self.device)
                own = [layer, *(twin_of(layer) for _ in range(lanes.count - 1))]

                @torch.inference_mode()  # which is a thread's own, too
                def run_some(lane: int, each: slice, own: list[Branches] = own) -> list[Tensor]:
                    outputs: list[Tensor] = []
                    context = attention_context(self._frame, places[each])
                    states[each] = self._pass(own[lane], states[each], context, outputs)
                    return outputs

                outputs = [output for found in lanes.map(run_some, rows) for output in found]
                if attention and outputs:
                    attention(index, torch.cat(outputs))
                if hidden:
                    hidden(index + 1, states)

    def _embed(self, tokens: Tensor, position_ids: Tensor) -> Float[Tensor, "sequence position feature"]:
        found: list[Tensor] = []
        self._start.run(tokens, position_ids, hidden=lambda _, state: found.append(state.float()))
        return found[0]

    def _pass(
        self, layer: Branches, states: Tensor, context: AttentionContext, outputs: list[Tensor]
    ) -> Float[Tensor, "sequence position feature"]:
        """One layer over some of the sequences; its attention outputs are kept beside."""
        keep = partial(_keep, into=outputs)
        own = nn.ModuleList([layer.layer])
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        )
        with autocast, capture.hooks(own, [layer.form], 0, None, None if context.apart else keep):
            if context.apart:
                return layer(states, context)
            return layer.own(states, context)


def _keep(_index: int, state: Tensor, into: list[Any]) -> None:
    into.append(state.clone())
