"""The teacher's trunk: embedding and layers up to the deepest state asked for, with hooks.

The LM head is never loaded, the layers above the deepest state neither.
"""

import copy
import inspect
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lftpipe.device import cast_linear
from lftpipe.errors import TeacherError, foreign
from lftpipe.teacher import attention, capture, skeleton
from lftpipe.teacher.capture import Sink
from lftpipe.teacher.quiet import quiet_transformers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.structure import structure_of

__all__ = ["Sink", "Trunk", "twin_of"]

Module = TypeVar("Module", bound=nn.Module)


class Trunk:
    """Runs the layers below state `deepest` and hands out what flows through them.

    Parameters
    ----------
    deepest
        The deepest state `h[l]` wanted; layers `0 .. l-1` are loaded and run.
    compute_dtype
        `torch.bfloat16` runs matrix products in it and keeps the residual stream in float32.

    Raises
    ------
    TeacherError
        If its weights do not load, or the hooks do not give what transformers says the states are.
    """

    def __init__(
        self, teacher: Teacher, deepest: int, compute_dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.deepest = deepest
        self.compute_dtype = torch.float32  # as long as it is tried
        self.device = torch.device("cpu")
        model = _derived_base(teacher, deepest) if teacher.family.derived else _base(teacher, deepest)
        self.model = model.eval().requires_grad_(False)
        self._layers_path = teacher.family.model_layers
        self._layers: Any = model.get_submodule(self._layers_path)
        self._forms = [teacher.family.form(teacher.config, index) for index in range(len(self._layers))]
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        taken = partial(capture.hooks, self._layers, self._forms, deepest, attention=None)
        self.apart = capture.check(
            self._forward,
            taken,
            teacher.model,
            teacher.config.vocab_size,
            deepest,
            not self._takes_positions,
        )
        if teacher.family.model_norm:
            model.set_submodule(teacher.family.model_norm, nn.Identity())  # no state is taken after it
        self.compute_dtype = compute_dtype
        cast_linear(model, compute_dtype)
        self.device = torch.device(device)
        self.model.to(self.device)

    @property
    def num_parameters(self) -> int:
        """Of all its layers."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that run."""
        return self._layers

    def twin(self) -> "Trunk":
        """The same weights in modules of their own: two threads may run them at the same time."""
        other = copy.copy(self)
        other.model = twin_of(self.model)
        other._layers = other.model.get_submodule(self._layers_path)
        return other

    @torch.inference_mode()
    def run(
        self,
        tokens: Int[Tensor, "sequence position"],
        position_ids: Int[Tensor, "sequence position"],
        *,
        hidden: Sink | None = None,
        attention: Sink | None = None,
    ) -> None:
        """One forward pass; `hidden(l, h[l])` and `attention(l, a[l])` are called as layers finish.

        `h[l]` is the residual stream entering layer `l`, and `h[L]` leaves the last layer, before
        the final norm. Attention stays inside segments: position ids restart with each.

        Parameters
        ----------
        hidden, attention
            What takes states and attention outputs. A layer without an attention branch gives none.
        """
        if self.apart and (position_ids[:, 1:] == 0).any():
            self._run_apart(tokens, position_ids, hidden, attention)
            return
        with capture.hooks(self._layers, self._forms, self.deepest, hidden, attention):
            self._forward(tokens, position_ids)

    def _forward(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> Any:
        places = {"position_ids": position_ids.to(self.device)} if self._takes_positions else {}
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        )
        with autocast:
            return self.model(input_ids=tokens.to(self.device), use_cache=False, **places, **options)

    def _run_apart(
        self, tokens: Tensor, position_ids: Tensor, hidden: Sink | None, attention: Sink | None
    ) -> None:
        """Segment by segment, those of equal places together; what was captured is put together again."""
        spans: dict[tuple[int, int], list[int]] = {}
        for row, places in enumerate(position_ids):
            starts = (places == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
                spans.setdefault((start, stop), []).append(row)
        kept: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for (start, stop), rows in spans.items():

            def keep(
                layer: int, state: Tensor, into: dict[int, Tensor], at: Any = (rows, slice(start, stop))
            ) -> None:
                if layer not in into:
                    into[layer] = state.new_zeros(*tokens.shape, state.shape[-1])
                into[layer][at] = state

            sinks = [partial(keep, into=each) for each in kept]
            with capture.hooks(self._layers, self._forms, self.deepest, sinks[0], sinks[1]):
                self._forward(tokens[rows, start:stop], position_ids[rows, start:stop])
        for sink, states in zip((hidden, attention), kept, strict=True):
            if sink is not None:
                for layer, state in sorted(states.items()):
                    sink(layer, state)


def twin_of(module: Module) -> Module:
    """A copy that shares all weights and buffers; hooks on one do not see what the other computes."""
    shared: dict[int, Any] = {id(each): each for each in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _base(teacher: Teacher, deepest: int) -> Any:
    """The base model of a family that is written out, by transformers."""
    from transformers import AutoModel

    with (
        foreign(TeacherError, f"model {teacher.model}", "weights that load", "fetch it again"),
        quiet_transformers(),
    ):
        loaded: Any = AutoModel.from_pretrained(
            teacher.folder,
            num_hidden_layers=max(deepest, 1),
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise TeacherError(
            f"model {teacher.model} without {missing[0]}",
            "all weights of its layers",
            "fetch or save it again",
        )
    return model


def _derived_base(teacher: Teacher, deepest: int) -> Any:
    """The base model of a derived family, from the checkpoint's single tensors."""
    structure = structure_of(teacher.config)
    with quiet_transformers():
        model = skeleton.build(teacher.config, structure.implementation)
    layers = model.get_submodule(structure.path)
    del layers[max(deepest, 1) :]
    base = model.base_model
    names = {name: structure.base_prefix + name for name in base.state_dict()}
    tensors = teacher.checkpoint.read(list(names.values()))
    base.load_state_dict({name: tensors[source] for name, source in names.items()}, assign=True)
    skeleton.materialise_buffers(model, base)
    return base
