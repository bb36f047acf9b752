"""Where a stage computes: device, threads, memory, and the format in which it multiplies fastest."""

import ctypes
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lftpipe.base.errors import SettingsError

# mallopt's parameters (glibc, malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def prepare_processor(threads: int | None) -> None:
    """Use so many threads, if it is said, and keep freed memory for the next tensor.

    glibc hands large blocks back to the kernel as soon as they are freed, and every new tensor of a
    layer then faults its pages in anew: a fifth of the time of a forward pass of a small model.

    Parameters
    ----------
    threads
        Threads for torch; None leaves torch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_ARENA_MAX, 1)  # a thread's own one gives its pages back whatever is said above


def cast_linear(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a frozen module's linear layers hold their weights in the format of its products.

    Autocast would cast them anew at every call. All else stays in float32.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.to(dtype)


def autocast(device: str | torch.device, dtype: torch.dtype) -> torch.autocast:
    """Within it, products are computed in bfloat16 if that is the format, and in float32 else."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as settings and stores write it."""
    return str(dtype).removeprefix("torch.")


def resolve_compute_dtype(name: str, device: str) -> torch.dtype:
    """`auto` to bfloat16 where the processor multiplies matrices in it, else to float32."""
    if name != "auto":
        return getattr(torch, name)
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported()
    elif kind == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = kind == "mps"
    return torch.bfloat16 if fast else torch.float32


def device_kind(device: str) -> str:
    """Where results are the same to the bit: `cpu`, or a GPU's model; a store is computed by one kind."""
    kind = torch.device(device).type
    return f"cuda {torch.cuda.get_device_name(device)}" if kind == "cuda" else kind


def prepare(device: str, threads: int | None) -> None:
    """Check that there is such a device, and make the processor ready.

    Parameters
    ----------
    threads
        Threads for torch; None leaves torch's own choice.

    Raises
    ------
    SettingsError
        If torch does not know the device, or has none of its kind.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        kinds = ["cpu", *(kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available())]
        raise SettingsError(
            f"--device {device}", f"a device of this machine: {', '.join(kinds)}", "name one"
        ) from error
    prepare_processor(threads)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, to a GPU copied without waiting for what is computed there.

    Parameters
    ----------
    tensor
        Of any format; pinned memory is copied as it is, other memory is pinned first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class CopyStream:
    """Copies to a device that run beside its computations; a processor has nothing to run them beside."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def beside(self) -> bool:
        """Whether copies run beside computations."""
        return self._stream is not None

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory that the device can be copied to from: pinned where copies run beside computations."""
        if not self.beside:
            return np.empty(shape, dtype)
        like = torch.from_numpy(np.empty(0, dtype))
        return torch.empty(shape, dtype=like.dtype, pin_memory=True).numpy()

    def copying(self) -> AbstractContextManager[Any]:
        """Within it, what is queued runs beside the device's computations."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def mark(self) -> Any:
        """A mark behind all that was queued so far, for `arrive` and `wait`."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Wait until the copies before a mark are done: what they read may be overwritten."""
        if mark is not None:
            mark.synchronize()

    def arrive(self, mark: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Let computations queued from now on follow the copies before a mark.

        Parameters
        ----------
        tensors
            What was copied: computations will use it, and its memory is theirs until then.
        """
        if mark is None:
            return
        computing = torch.cuda.current_stream()
        computing.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(computing)
