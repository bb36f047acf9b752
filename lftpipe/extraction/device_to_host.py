"""How a computed batch gets to the memory that it is written from.

On the processor it is rounded there at once, by the caller (`Direct`). From a GPU it is rounded on the device
and copied by a stream of its own into a ring of pinned memory, while the teacher goes on computing (`Ring`);
the thread that writes waits for the copy. Both are used alike: `send` in the thread that computes, `slot` of
what it returns in the thread that writes, in the same order.
"""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from lftpipe.store import ShardWriter, Slot

#: Pinned memory of the ring: several batches of one layer of the largest teachers.
RING_BYTES = 512 * 2**20


@runtime_checkable
class Sent(Protocol):
    """A batch on its way to the writing thread."""

    @property
    def num_bytes(self) -> int:
        """As it is stored."""
        ...

    def slot(self) -> Slot:
        """Wait for it; where it can be written from. To be called once."""
        ...


@runtime_checkable
class Transfer(Protocol):
    """Moves batches from where they were computed."""

    def send(self, shard: ShardWriter, array: str, layer: int | None, first: int, values: Tensor) -> Sent:
        """Begin to move a batch, which may be overwritten once this returns; waits where there is no room.

        `array`, `layer`: which array of the shard, and which layer of it.
        """
        ...

    def close(self) -> None:
        """Nothing more will be fetched: whoever waits for room gets an error."""
        ...


@dataclass(frozen=True)
class _Filled:
    """A slot that was filled at once."""

    filled: Slot

    @property
    def num_bytes(self) -> int:
        return self.filled.values.nbytes

    def slot(self) -> Slot:
        return self.filled


class Direct(Transfer):
    """Rounds a batch in the calling thread to where it will be written from.

    The threads of a matrix product would all wait for one that loses its core to a rounding writer.
    """

    @override
    def send(self, shard: ShardWriter, array: str, layer: int | None, first: int, values: Tensor) -> Sent:
        slot = shard.slot(array, layer, first, len(values))
        fill(torch.from_numpy(slot.values), values)
        return _Filled(slot)

    def close(self) -> None:
        """Nothing to let go of."""


def fill(out: Tensor, values: Tensor) -> None:
    """Round a batch into memory of the storage format.

    `out`: to be filled; no two sequences need lie next to each other.
    """
    for target, sequence in zip(out, values, strict=True):
        if sequence.dtype == torch.bfloat16:  # directly to float16 takes torch six times as long
            sequence = sequence.float()  # one by one they stay in the processor's cache
        target.copy_(sequence)


@runtime_checkable
class Event(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Wait for it."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Where copies are made, one after the other, behind the back of the one who asks for them."""

    def memory(self, num_bytes: int) -> Tensor:
        """Bytes that copies may end in."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Begin a copy; `source` stays as it is until the event."""
        ...


class CudaStream(Stream):
    """A stream of a CUDA device beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    @override
    def memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @override
    def copy(self, target: Tensor, source: Tensor) -> Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        source.record_stream(
            self._stream
        )  # its memory is not given to another tensor before the copy is made
        return done


class _Region:
    """A part of the ring that one batch has."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.free = start, stop, False


class Ring(Transfer):
    """Rounds on the device and copies into a ring of pinned memory.

    `num_bytes`: of the ring: what is on its way to the disk is never more, but for a single larger batch.
    """

    def __init__(self, stream: Stream, num_bytes: int = RING_BYTES) -> None:
        self._stream = stream
        self._memory = stream.memory(num_bytes)
        self._used: deque[_Region] = deque()  # oldest first; freed in any order, taken back in this one
        self._room = threading.Condition()
        self._closed = False

    @override
    def send(self, shard: ShardWriter, array: str, layer: int | None, first: int, values: Tensor) -> Sent:
        dtype = getattr(torch, shard.dtype(array))
        rounded = values.to(dtype, copy=True).contiguous()  # the caller may overwrite its own
        region = self._take(rounded.nbytes)
        target = self._memory[region.start : region.stop].view(dtype).view(rounded.shape)
        done = self._stream.copy(target, rounded)
        return _OnItsWay(self, region, target, done, shard, (array, layer, first))

    def close(self) -> None:
        """See `Transfer.close`."""
        with self._room:
            self._closed = True
            self._room.notify_all()

    def give_back(self, region: _Region) -> None:
        """The batch in it was fetched."""
        with self._room:
            region.free = True
            while self._used and self._used[0].free:
                self._used.popleft()
            self._room.notify_all()

    def _take(self, num_bytes: int) -> _Region:
        """Wait for room: behind the youngest batch, or at the start again."""
        aligned = -(-num_bytes // 64) * 64
        with self._room:
            if aligned > len(self._memory):
                self._room.wait_for(lambda: self._closed or not self._used)
                if not self._closed:
                    self._memory = self._stream.memory(aligned)
            self._room.wait_for(lambda: self._closed or self._place(aligned) is not None)
            start = self._place(aligned)
            if self._closed or start is None:
                raise InterruptedError("the ring is closed")
            region = _Region(start, start + num_bytes)
            self._used.append(region)
            return region

    def _place(self, num_bytes: int) -> int | None:
        if not self._used:
            return 0
        oldest, end = self._used[0].start, -(-self._used[-1].stop // 64) * 64
        if self._used[-1].start < oldest:  # it has gone round: free is what lies between
            return end if end + num_bytes <= oldest else None
        if end + num_bytes <= len(self._memory):
            return end
        return 0 if num_bytes <= oldest else None


@dataclass(frozen=True)
class _OnItsWay:
    """A batch that is being copied into the ring."""

    ring: Ring
    region: _Region
    target: Tensor
    done: Event
    shard: ShardWriter
    place: tuple[str, int | None, int]

    @property
    def num_bytes(self) -> int:
        return self.target.nbytes

    def slot(self) -> Slot:
        self.done.synchronize()
        array, layer, first = self.place
        slot = self.shard.slot(array, layer, first, len(self.target))
        torch.from_numpy(slot.values).copy_(self.target)
        self.ring.give_back(self.region)
        return slot


def transfer_from(device: torch.device) -> Transfer:
    """What suits a device."""
    return Ring(CudaStream(device)) if device.type == "cuda" else Direct()
