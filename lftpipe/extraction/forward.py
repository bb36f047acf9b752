"""Forward passes whose states go to the store, and the error that bfloat16 makes in them."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lftpipe.base.executor import Advance
from lftpipe.data.batches import Batch, make_batch
from lftpipe.extraction.async_writer import Background, Commit
from lftpipe.extraction.device_to_host import fill, transfer_from
from lftpipe.store import ShardKey, ShardWriter, Store, StoreSpec, most_bytes, produce_shard
from lftpipe.teacher.thread_pool import Lanes
from lftpipe.teacher.trunk import Head, Put, StreamedTrunk, Trunk, compute_batch

# --- The teacher's passes over the tokens of a store in the making.

#: Shards of a device whose copies wait for the disk: as many as it computes while one is synced.
SHARDS_IN_FLIGHT = {"cpu": 2, "cuda": 4}

#: Bytes of computed batches that may wait for the one before them.
HELD_BYTES = 4 * 2**30


class _Batch(NamedTuple):
    """What the trunk is given at once."""

    key: ShardKey
    first: int
    """Index within the shard."""
    given: Batch

    @property
    def is_last(self) -> bool:
        return self.first + len(self.given) == len(self.key.sequences)


class Passes:
    """Runs a teacher over the sequences of a store, and writes what it computes.

    On a processor, several batches are computed side by side, each by one thread.

    `attempt`: names the files; no other process may use it for this store.
    """

    def __init__(
        self,
        path: Path,
        spec: StoreSpec,
        trunk: Trunk,
        head: Head | None,
        attempt: str,
        pass_sequences: int,
    ) -> None:
        self.pass_sequences = pass_sequences
        self.path, self.spec, self.head, self.attempt = path, spec, head, attempt
        self._tokens = Store.unfinished(path, spec)
        self._kept = {"hidden": set(spec.layers), "attention": set(spec.attention_layers)}
        self._free: list[np.ndarray] = []  # memory that shards written before let go
        self._shards = 0
        self.device = trunk.device
        self._lanes: Lanes | None = None
        if trunk.device.type == "cpu" and not isinstance(trunk, StreamedTrunk):  # that has lanes of its own
            self._lanes = Lanes.on(trunk.device, self._most_lanes())
        count = self._lanes.count if self._lanes else 1
        self._trunks = [trunk, *(trunk.twin() for _ in range(count - 1))]

    def run(self, keys: Iterable[ShardKey | None], commit: Commit, advance: Advance) -> None:
        """Compute some shards, while threads encode and write what was computed before.

        `keys`: which, taken as there are threads for them; None if there is none for now.
        `commit`: called in a thread with every shard that is on the disk, in this order.
        """
        transfer = transfer_from(self.device)
        in_flight = SHARDS_IN_FLIGHT.get(self.device.type, 2)
        with (
            Background(self._open, commit, transfer, in_flight) as background,
            self._lanes or nullcontext() as lanes,
        ):
            if lanes is None or lanes.count == 1:
                self._run_alone(keys, background, advance)
                return
            for batch, found in lanes.map(self._computed, self._batches(keys)):
                if batch.first == 0:
                    background.begin_shard(batch.key)
                for array, layer, values in found:
                    background.put(array, layer, batch.first, values)
                self._end(batch, background, advance)

    def _run_alone(self, keys: Iterable[ShardKey | None], background: Background, advance: Advance) -> None:
        """Every state is written as soon as it is computed: nothing is held."""
        for batch in self._batches(keys):
            if batch is None:
                continue
            if batch.first == 0:
                background.begin_shard(batch.key)
            self._compute(0, batch, partial(_put, background, batch.first))
            self._end(batch, background, advance)

    def _batches(self, keys: Iterable[ShardKey | None]) -> Iterator[_Batch | None]:
        for key in keys:
            if key is None:
                yield None
                continue
            for first in range(0, len(key.sequences), self.pass_sequences):
                rows = key.sequences[first : first + self.pass_sequences]
                yield _Batch(key, first, batch_of(self._tokens, key.split, rows, self.device))

    def _end(self, batch: _Batch, background: Background, advance: Advance) -> None:
        advance(len(batch.given) * self.spec.context)
        if batch.is_last:
            background.end_shard()

    def _computed(self, lane: int, batch: _Batch) -> tuple[_Batch, list[tuple[str, int | None, Tensor]]]:
        """All that is stored of a batch, rounded; its turn to be written comes later."""
        found: list[tuple[str, int | None, Tensor]] = []

        def put(array: str, layer: int | None, values: Tensor) -> None:
            rounded = torch.empty(values.shape, dtype=getattr(torch, self.spec.arrays[array].dtype))
            fill(rounded, values)
            found.append((array, layer, rounded))

        self._compute(lane, batch, put)
        return batch, found

    def _compute(self, lane: int, batch: _Batch, put: Put) -> None:
        def wanted(array: str, layer: int | None, values: Tensor) -> None:
            if layer is None or layer in self._kept[array]:
                put(array, layer, values)

        size = self.spec.identity["batch_sequences"]
        given = batch.given
        compute_batch(self._trunks[lane], self.head, given.tokens, given.visible_places, wanted, size)

    def _most_lanes(self) -> int:
        """So that the batches that wait for their turn take no more than `HELD_BYTES`."""
        return max(2, HELD_BYTES // max(1, most_bytes(self.spec, self.pass_sequences)) - 1)

    def _open(self, key: ShardKey) -> AbstractContextManager[ShardWriter]:
        self._shards += 1
        attempt = f"{self.attempt}-{self._shards}"
        return produce_shard(self.path, self.spec, key, attempt, free=self._free)


def _put(background: Background, first: int, array: str, layer: int | None, values: Tensor) -> None:
    background.put(array, layer, first, values)


def batch_of(tokens: Store, split: str, rows: range, device: torch.device) -> Batch:
    """Some sequences, without states, on the device."""
    return make_batch(tokens.tokens(split, rows), tokens.document(split, rows), device)


# --- What computing in bfloat16 costs: every stored state against float32, on the first batch of `train`.

Errors = dict[str, dict[str, list[float | None]]]


def bf16_error(
    path: Path, spec: StoreSpec, load_exact: Callable[[], Trunk], load: Callable[[], Trunk], device: str
) -> dict[str, Any]:
    """The error of a trunk's states against those computed in float32.

    The float32 trunk is gone before the other is loaded, its layers come to the device one at a time, and its
    states wait in a file without a name: measuring takes no more memory than extracting does.

    Returns `sequences`, `tokens`; of `hidden` and `attention` the lists `nmse` and `nmse_without_first`
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
            compute_batch(exact, None, batch.tokens, batch.visible_places, write)
        del exact
        scratch.seek(0)
        compute_batch(load(), None, batch.tokens, batch.visible_places, compare)
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
