"""The teacher's passes over the tokens of a store in the making."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lftpipe.batch import Batch, make_batch
from lftpipe.extraction.background import Background, Commit
from lftpipe.extraction.transfer import fill, transfer_from
from lftpipe.store import ShardKey, ShardWriter, Store, StoreSpec, most_bytes, produce_shard
from lftpipe.teacher.lanes import Lanes
from lftpipe.teacher.logits import Head, Put, compute_batch
from lftpipe.teacher.streamed import StreamedTrunk
from lftpipe.teacher.trunk import Trunk

#: Shards of a device whose copies wait for the disk: as many as it computes while one is synced.
SHARDS_IN_FLIGHT = {"cpu": 2, "cuda": 4}

#: Bytes of computed batches that may wait for the one before them.
HELD_BYTES = 4 * 2**30

#: Called with the number of tokens that were computed.
Advance = Callable[[int], object]


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

    Parameters
    ----------
    attempt
        Names the files; no other process may use it for this store.
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

        Parameters
        ----------
        keys
            Which, taken as there are threads for them; None if there is none for now.
        commit
            Called in a thread with every shard that is on the disk, in this order.
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
        compute_batch(self._trunks[lane], self.head, given.tokens, given.position_ids, wanted, size)

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
