"""What computing in bfloat16 costs: every stored state against float32, on the first batch of `train`."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lftpipe.extraction.forward import batch_of
from lftpipe.store import Store, StoreSpec
from lftpipe.teacher.logits import compute_batch
from lftpipe.teacher.trunk import Trunk

Errors = dict[str, dict[str, list[float | None]]]


def bf16_error(
    path: Path, spec: StoreSpec, load_exact: Callable[[], Trunk], load: Callable[[], Trunk], device: str
) -> dict[str, Any]:
    """The error of a trunk's states against those computed in float32.

    The float32 trunk is gone before the other is loaded, its layers come to the device one at a time, and its
    states wait in a file without a name: measuring takes no more memory than extracting does.

    Returns
    -------
    dict
        `sequences`, `tokens`; of `hidden` and `attention` the lists `nmse` and `nmse_without_first`
        (position 0 left out), in the order of the stored layers. JSON-plain.
    """
    count = min(spec.identity["batch_sequences"], spec.sequences["train"])
    batch = batch_of(Store.unfinished(path, spec), "train", range(count), torch.device(device))
    kept = {"hidden": spec.layers, "attention": spec.attention_layers}
    errors: Errors = {array: {"nmse": [], "nmse_without_first": []} for array in kept if kept[array]}
    with tempfile.TemporaryFile(dir=path.parent) as scratch:

        def write(array: str, layer: int | None, state: Tensor) -> None:
            if layer in kept[array]:
                scratch.write(state.float().cpu().contiguous().numpy().data)

        def compare(array: str, layer: int | None, state: Tensor) -> None:
            if layer in kept[array]:
                ours = state.float().cpu().numpy()
                theirs = np.frombuffer(scratch.read(ours.nbytes), np.float32).reshape(ours.shape)
                for name, first in (("nmse", 0), ("nmse_without_first", 1)):
                    errors[array][name].append(_nmse(ours[:, first:], theirs[:, first:]))

        with layer_by_layer(load_exact(), torch.device(device)) as exact:
            compute_batch(exact, None, batch.tokens, batch.position_ids, write)
        del exact
        scratch.seek(0)
        compute_batch(load(), None, batch.tokens, batch.position_ids, compare)
    return {"sequences": len(batch), "tokens": batch.tokens.numel(), **errors}


@contextmanager
def layer_by_layer(trunk: Trunk, device: torch.device) -> Iterator[Trunk]:
    """A trunk on the processor, to be run on a device that holds no more than one of its layers."""
    if device == trunk.device:
        yield trunk
        return
    layers, home = trunk.layers, trunk.device
    inside = {id(part) for part in layers.modules()}
    for part in trunk.model.modules():
        if id(part) not in inside:
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    held[name] = None if value is None else _moved(value, device)

    def enter(layer: nn.Module, _: Any) -> None:
        layer.to(device)

    def leave(layer: nn.Module, *_: Any) -> None:
        layer.to(home)

    hooks = [layer.register_forward_pre_hook(enter, prepend=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    trunk.device = device
    try:
        yield trunk
    finally:
        trunk.device = home
        for hook in hooks:
            hook.remove()


def _moved(value: Tensor, device: torch.device) -> Tensor:
    moved = value.to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved


def _nmse(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Squared error over squared norm, to three digits: it is an estimate from one batch.

    None if it is not finite: extraction will say which state is not.
    """
    energy = float(np.square(theirs, dtype=np.float64).sum())
    error = float(np.square(ours - theirs, dtype=np.float64).sum())
    fraction = error / energy if energy else error
    return float(f"{fraction:.3g}") if math.isfinite(fraction) else None
