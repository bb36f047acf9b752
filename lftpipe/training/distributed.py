"""Data-parallel training under `torchrun`: every process takes its part of each batch."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lftpipe.base.progress import launched

T = TypeVar("T")


#: How long processes wait for the first one while it works alone: it makes the map, fits, and writes.
PATIENCE = timedelta(days=7)


def join(device: str) -> None:
    """Join the processes that a launcher such as `torchrun` started, if one did."""
    if launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        _patient()  # made by all at once, before any of them works alone


@cache
def _patient() -> dist.ProcessGroup:
    """All processes, for what they may wait long for; nccl gives up after ten minutes."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def leave() -> None:
    """Let go of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _patient.cache_clear()


def count() -> int:
    """Processes that share each batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def agree(value: T | None) -> T:
    """What process 0 has, on all of them.

    `value`: on process 0; the others have None.
    """
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=_patient())
    (agreed,) = values
    assert agreed is not None
    return agreed


def mean(value: Tensor) -> Tensor:
    """The mean over the processes, on all of them."""
    if count() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / count()


def divided(values: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What `work` makes of a stack, of which each process works on its part; all of it on all of them.

    `values`: along its first axis the pieces of work, the same on all processes.
    """
    if count() == 1:
        return work(values)
    mine = slice(rank(), None, count())
    part = work(values[mine])
    whole = torch.zeros(len(values), *part.shape[1:], device=part.device)
    whole[mine] = part.float()
    dist.all_reduce(whole)
    return whole


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange.

    A wrapper like `DistributedDataParallel` expects one forward pass a step; a walk has many.
    """
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier(_patient())
