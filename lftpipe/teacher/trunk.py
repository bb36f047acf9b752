"""The teacher's trunk: embedding and layers up to the deepest state asked for, with hooks.

The LM head is never loaded, the layers above the deepest state neither.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from lftpipe.device import cast_linear
from lftpipe.errors import TeacherError
from lftpipe.teacher import attention
from lftpipe.teacher.source import Teacher, quiet_transformers

#: Called with `(l, tensor)`; the tensor is `(sequence, position, feature)` and must be used at once.
Sink = Callable[[int, Tensor], None]


class Trunk:
    """Runs the layers below state `deepest` and hands out what flows through them.

    Parameters
    ----------
    teacher
        Whose trunk.
    deepest
        The deepest state `h[l]` wanted; layers `0 .. l-1` are loaded and run.
    compute_dtype
        `torch.bfloat16` runs matrix products in it and keeps the residual stream in float32.
    device
        Where to run.
    """

    def __init__(
        self, teacher: Teacher, deepest: int, compute_dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        from transformers import AutoModel

        self.deepest = deepest
        self.compute_dtype = compute_dtype
        self.device = torch.device(device)
        try:
            with quiet_transformers():
                model, loading = AutoModel.from_pretrained(
                    teacher.folder,
                    num_hidden_layers=max(deepest, 1),
                    dtype=torch.float32,
                    attn_implementation=attention.NAME,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TeacherError(
                f"model {teacher.model} ({reason})", "weights that load", "fetch it again"
            ) from error
        if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
            raise TeacherError(
                f"model {teacher.model} without {missing[0]}",
                "all weights of its layers",
                "fetch or save it again",
            )
        cast_linear(model, compute_dtype)
        setattr(model, teacher.family.model_norm, nn.Identity())  # no state is taken after it
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._layers: Any = getattr(model, teacher.family.model_layers)
        self._attention = teacher.family.attention

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

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
        the final norm. Attention stays inside pieces: position ids restart with each.
        """
        hooks = []
        if hidden:
            for index, layer in enumerate(self._layers):
                if index <= self.deepest:
                    hooks.append(layer.register_forward_pre_hook(_entering(index, hidden)))
            if self.deepest == len(self._layers):
                hooks.append(self._layers[-1].register_forward_hook(_leaving(self.deepest, hidden)))
        if attention:
            for index, layer in enumerate(self._layers):
                branch = getattr(layer, self._attention)
                hooks.append(branch.register_forward_hook(_leaving(index, attention)))
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        )
        try:
            with autocast:
                self.model(
                    input_ids=tokens.to(self.device),
                    position_ids=position_ids.to(self.device),
                    use_cache=False,
                )
        finally:
            for hook in hooks:
                hook.remove()


def _entering(index: int, sink: Sink) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        sink(index, arguments[0])

    return hook


def _leaving(index: int, sink: Sink) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        sink(index, output[0] if isinstance(output, tuple) else output)

    return hook
