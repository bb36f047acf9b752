"""The teacher's passes over the tokens of a store in the making."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lftpipe.batch import Batch, make_batch
from lftpipe.extraction.background import Background, Commit
from lftpipe.extraction.transfer import transfer_from
from lftpipe.store import ShardKey, ShardWriter, Store, StoreSpec, produce_shard
from lftpipe.teacher.logits import Head, compute_batch
from lftpipe.teacher.trunk import Trunk

#: Shards of a device whose copies wait for the disk: as many as it computes while one is synced.
SHARDS_IN_FLIGHT = {"cpu": 2, "cuda": 4}

#: Called with the number of tokens that were computed.
Advance = Callable[[int], object]


class Passes:
    """Runs a teacher over the sequences of a store, and writes what it computes.

    Parameters
    ----------
    path, spec
        The store in the making; its tokens are stored.
    trunk, head
        The teacher.
    attempt
        Names the files; no other process may use it for this store.
    pass_sequences
        Sequences that the trunk is given at once.
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
        self.path, self.spec, self.trunk, self.head, self.attempt = path, spec, trunk, head, attempt
        self._tokens = Store.unfinished(path, spec)
        self._kept = {"hidden": set(spec.layers), "attention": set(spec.attention_layers)}
        self._free: list[np.ndarray] = []  # memory that shards written before let go
        self._shards = 0

    def run(self, keys: Iterable[ShardKey], commit: Commit, advance: Advance) -> None:
        """Compute some shards, while threads encode and write what was computed before.

        Parameters
        ----------
        keys
            Which; the next one is asked for when the one before is computed.
        commit
            Called in a thread with every shard that is on the disk, in this order.
        advance
            Called after every batch.
        """
        kind = self.trunk.device.type
        transfer = transfer_from(self.trunk.device)
        with Background(self._open, commit, transfer, SHARDS_IN_FLIGHT.get(kind, 2)) as background:
            for key in keys:
                background.begin_shard(key)
                for first in range(0, len(key.sequences), self.pass_sequences):
                    rows = key.sequences[first : first + self.pass_sequences]
                    self._batch(background, key, first, rows)
                    advance(len(rows) * self.spec.context)
                background.end_shard()

    def _batch(self, background: Background, key: ShardKey, first: int, rows: range) -> None:
        def put(array: str, layer: int | None, values: Tensor) -> None:
            if layer is None or layer in self._kept[array]:
                background.put(array, layer, first, values)

        batch = batch_of(self._tokens, key.split, rows, self.trunk.device)
        size = self.spec.identity["batch_sequences"]
        compute_batch(self.trunk, self.head, batch.tokens, batch.position_ids, put, size)

    def _open(self, key: ShardKey) -> AbstractContextManager[ShardWriter]:
        self._shards += 1
        attempt = f"{self.attempt}-{self._shards}"
        return produce_shard(self.path, self.spec, key, attempt, free=self._free)


def batch_of(tokens: Store, split: str, rows: range, device: torch.device) -> Batch:
    """Some sequences, without states, on the device.

    Parameters
    ----------
    tokens
        The store that has the tokens.
    split, rows
        Which sequences.
    device
        Where the batch is to be.
    """
    return make_batch(tokens.tokens(split, rows), tokens.document(split, rows), device)
