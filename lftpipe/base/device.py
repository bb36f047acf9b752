"""Where a stage computes: device, threads, and the format in which it multiplies fastest."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lftpipe.base.errors import SettingsError

#: What launchers call the number of a process on its machine: torchrun, Slurm.
_LOCAL_NUMBERS = ("LOCAL_RANK", "SLURM_LOCALID")

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def prepared(device: str, threads: int | None) -> Iterator[None]:
    """Compute on a device, in so many threads; afterwards the process is as it was before, errors or not.

    The device is torch's current one meanwhile. Torch's threads, current GPU and random state are restored.

    `device`: a device as torch names it: `cpu`, `cuda`, `cuda:1`.
    `threads`: threads for torch; None leaves torch's own choice.
    Raises `SettingsError` if torch does not know the device, or has none of its kind.
    """
    before = torch.get_num_threads()
    with ExitStack() as restored:
        try:
            where = torch.device(device)
            if where.type == "cuda":  # first: whatever touches a GPU before makes a context on the first one
                restored.enter_context(torch.cuda.device(where))
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError, ValueError) as error:
            kinds = ["cpu", *(kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available())]
            raise SettingsError(
                f"--device {device}", f"a device of this machine: {', '.join(kinds)}", "name one"
            ) from error
        restored.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        if threads:
            restored.callback(torch.set_num_threads, before)
            torch.set_num_threads(threads)
        yield


def on_device(stage: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A stage that runs `prepared` for the device and the threads of its settings.

    `stage`: takes settings first. A stage whose settings have no device computes on the processor.
    """

    @wraps(stage)
    def run(settings: S, *arguments: P.args, **options: P.kwargs) -> R:
        named: Any = settings
        device: str = getattr(named, "device", "cpu")
        if getattr(named, "workers", 1) == 1 and (gpu := own_gpu(device)) != device:
            named, device = replace(named, device=gpu), gpu
        with prepared(device, named.threads):
            return stage(named, *arguments, **options)

    return run


def own_gpu(device: str) -> str:
    """`cuda` as the one GPU that a launcher gives this process; any other device as it is.

    `device`: as in `--device`.
    """
    number = next((os.environ[name] for name in _LOCAL_NUMBERS if os.environ.get(name, "").isdigit()), None)
    if device != "cuda" or number is None:
        return device
    return f"cuda:{int(number) % max(torch.cuda.device_count(), 1)}"  # it may see its own GPU alone


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
        with torch.cuda.device(device):  # torch asks the current one
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = kind == "mps"
    return torch.bfloat16 if fast else torch.float32


def device_kind(device: str) -> str:
    """Where results are the same to the bit: `cpu`, or a GPU's model; a store is computed by one kind."""
    kind = torch.device(device).type
    return f"cuda {torch.cuda.get_device_name(device)}" if kind == "cuda" else kind


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the processor where its device has no such numbers (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what is queued there: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, to a GPU copied without waiting for what is computed there.

    `tensor`: of any format; pinned memory is copied as it is, other memory is pinned first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class CopyStream:
    """Copies to a device that run beside its computations; a processor has nothing to run them beside."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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

        `tensors`: what was copied: computations will use it, and its memory is theirs until then.
        """
        if mark is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(computing)
