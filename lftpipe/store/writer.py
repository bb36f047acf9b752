"""Writing a store: shard by shard, resumable at any moment, complete only when all is on disk and checked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int32

from lftpipe.base.errors import StoreError
from lftpipe.base.files import sync_folder
from lftpipe.storage import Writes, local_path, writable_storage_of
from lftpipe.store import resume as opening
from lftpipe.store.commit_log import Ledger, Sealed, clear_leftovers, disk_errors, remove_partials, take_lock
from lftpipe.store.layout import MANIFEST, ArrayLayout, ShardKey, StoreSpec, metadata, read_plan, write_plan
from lftpipe.store.manifest import Manifest, describe, refuse_other
from lftpipe.store.records import Records, digests, on_disk
from lftpipe.store.shard import ChunkReader, DamagedShardError
from lftpipe.store.shard_writer import ShardWriter, produce_shard
from lftpipe.store.verify import Report


class StoreWriter:
    """The one writer of a store, from `open` to the end of the ``with`` block.

    `complete`: whether everything the specification asks for is on disk and checked.
    `epoch`: how many times it was opened to be computed: part of the names of what is produced.
    """

    def __init__(self, path: Path, spec: StoreSpec, lock: int) -> None:
        """Use `open`."""
        self.path, self.spec, self.complete, self.epoch, self.fresh = path, spec, False, 0, True
        self.storage = writable_storage_of(path)
        self._lock = lock
        self.ledger = Ledger(path, self.storage, {}, {})
        self._free: list[np.ndarray] = []  # memory that shards written before let go

    @classmethod
    def open(
        cls,
        path: Path,
        spec: StoreSpec,
        *,
        resume: bool = True,
        force: bool = False,
        repair: Report | None = None,
        recheck: bool = False,
    ) -> "StoreWriter":
        """Begin a store, go on with an incomplete one, add sequences to a complete one, or repair one.

        `recheck`: whether a corpus that ended early may have grown since; left out, a store that was once
        asked for just as much is not asked for more than it holds.
        Raises `StoreError` if another process writes it, its identity differs, it holds more than asked for,
        or ``path`` cannot be written or holds something else.
        """
        path = local_path(path)
        with disk_errors(path):
            refuse_other(path, replace=force)  # before a lock file lies in it
            path.mkdir(parents=True, exist_ok=True)
            self = cls(path, spec, take_lock(path))
            try:
                self._begin(resume, force, repair, recheck)
            except BaseException:
                self.close()
                raise
        return self

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock; what is not finished can be resumed."""
        try:
            self.ledger.close()
        finally:  # however that ended, the next one may write
            try:
                self.storage.close()
            finally:
                if self._lock >= 0:
                    os.close(self._lock)
                    self._lock = -1

    def pending(self) -> list[ShardKey]:
        """The shards whose states are still to be computed, in order."""
        todo = []
        for key in self.spec.shard_keys():
            stored = min((self.stored(key, array) for array in self._computed), default=len(key.sequences))
            if stored < len(key.sequences):
                todo.append(ShardKey(key.split, key.index, key.sequences[stored:]))
        return todo

    @contextmanager
    def shard(self, key: ShardKey, arrays: list[ArrayLayout] | None = None) -> Iterator[ShardWriter]:
        """Write one pending shard: it counts when the block ends; an error within leaves nothing behind.

        `arrays`: left out, all that the teacher computes.
        """
        assert self.ledger.is_open, "nothing is pending in a complete store"
        attempt = f"e{self.epoch}"
        with produce_shard(self.path, self.spec, key, attempt, arrays=arrays, free=self._free) as shard:
            yield shard
        assert shard.sealed is not None
        self.commit(shard.sealed)

    def commit(self, *sealed: Sealed) -> int:
        """Take shards that were produced, here or elsewhere, as `Ledger.take` does; how many were taken."""
        return self.ledger.take(*sealed)

    def put_tokens(
        self,
        split: str,
        tokens: Int32[np.ndarray, "sequence position"],
        document: Int32[np.ndarray, "sequence position"],
        first: int = 0,
    ) -> None:
        """Store the tokens of a split, all at once or piece by piece.

        `first`: index of the first sequence given; all before it, back to the last multiple of
        `sequences_per_shard`, must be stored. It ends at such a multiple or with the split.
        Raises `StoreError` if other tokens are stored already: the store was made from another corpus or
        tokenizer.
        """
        stop = first + len(tokens)
        for key in self.spec.shard_keys():
            begin, end = max(first, key.sequences.start), min(stop, key.sequences.stop)
            if key.split == split and begin < end:
                part = slice(begin - first, end - first)
                self._put_shard_tokens(key, begin, {"tokens": tokens[part], "document": document[part]})

    def _put_shard_tokens(self, key: ShardKey, begin: int, parts: dict[str, np.ndarray]) -> None:
        """Store one shard's tokens from sequence ``begin`` on, and compare those that are stored already."""
        arrays = [self.spec.arrays[name] for name in parts]
        origin = key.sequences.start
        try:
            stored = min(self.stored(key, array) for array in arrays)
            for array in arrays:
                part = parts[array.name][: max(origin + stored - begin, 0)]
                self._compare_tokens(array, key, part, begin - origin)
        except (DamagedShardError, FileNotFoundError) as error:
            if self.complete:
                raise StoreError(str(error), "an undamaged store", "run `lftpipe extract --repair`") from None
            self.forget({array.file(key.split, key.index) for array in arrays})
            stored = 0
        if stored == len(key.sequences):
            return
        rest = key.sequences[stored:]
        if begin > rest.start:
            raise ValueError(
                f"tokens of {key.split} sequence {rest.start} must be put before those of {begin}"
            )
        with self.shard(ShardKey(key.split, key.index, rest), arrays) as shard:
            for name, part in parts.items():
                shard.put(name, None, 0, part[rest.start - begin :])

    def _compare_tokens(self, array: ArrayLayout, key: ShardKey, rows: np.ndarray, first: int) -> None:
        """Refuse rows that differ from the stored ones, from the shard's chunk ``first`` on."""
        if not len(rows):
            return
        reader = ChunkReader(self.storage, array.file(key.split, key.index), array.chunks_per_shard)
        stored = np.empty(array.chunk, array.dtype)
        for chunk, row in enumerate(rows, start=first):
            if not np.array_equal(reader.read(chunk, stored), row):
                sequence = key.sequences.start + chunk
                raise StoreError(
                    f"{array.name} of {key.split} sequence {sequence} are not the stored ones",
                    "the corpus and the tokenizer the store was begun with",
                    "use those, name another --store, or start over (--force)",
                )

    def note(self, sequences: dict[str, int] | None = None, **details: Any) -> None:
        """Record details of a store in the making; whoever resumes it finds them in its specification.

        `sequences`: how many each split has, where that was not known before: never fewer than are stored.
        """
        changed = {key: value for key, value in {**self.spec.details, **details}.items() if value is not None}
        spec = replace(self.spec, details=changed, sequences=sequences or self.spec.sequences)
        if spec == self.spec:
            return
        assert self.ledger.is_open, "a complete store takes no notes"
        with disk_errors(self.path):
            self.ledger.begin(spec)
            self.spec = spec

    def begin_epoch(self, plan: dict[str, Any]) -> None:
        """Freeze what is to be computed into `plan.json`; what was begun before under another plan is void.

        `plan`: JSON-plain; `epoch` is added: how many times this store was opened to be computed.
        """
        with disk_errors(self.path):
            self.epoch = (read_plan(self.path) or {"epoch": 0})["epoch"] + 1
            write_plan(self.path, {**plan, "epoch": self.epoch})

    def discard_attempts(self) -> None:
        """Remove what the processes of this epoch left unfinished; they have ended."""
        remove_partials(self.path, f"e{self.epoch}-")

    def missing_tokens(self) -> str | None:
        """The first shard whose tokens are not all stored, in words; None if there is none."""
        token_arrays = [array for array in self.spec.arrays.values() if not array.computed]
        for key in self.spec.shard_keys():
            for array in token_arrays:
                if self.stored(key, array) < len(key.sequences):
                    return f"{array.name} of {key.split} shard {key.index}"
        return None

    def finish(self) -> None:
        """Check everything on disk, then declare the store complete.

        Raises `StoreError` if shards are missing, or one that an earlier process wrote has changed since:
        then it is pending again.
        """
        if self.complete:
            return
        with disk_errors(self.path):
            self._refuse_incomplete()
            files = metadata(self.spec, complete=True)
            write_metadata(self.storage, files)
            clear_leftovers(self.path)
            described = {name: describe(data) for name, data in files.items()}
            Manifest.write(self.path, self.spec, dict(sorted(self.ledger.records.items())), described)
            self.storage.remove_log()
            sync_folder(self.path)
        self.complete = True

    def _refuse_incomplete(self) -> None:
        """Everything that must be there is there, and what an earlier process wrote is what it wrote."""
        if todo := self.pending():
            raise StoreError(
                f"{len(todo)} shards of {self.path} are not written",
                "all of them",
                "run `lftpipe extract --resume`",
            )
        if missing := self.missing_tokens():
            raise ValueError(f"{missing} was never put")
        self.refuse_changed(self.ledger.records)

    def refuse_changed(self, records: Records) -> None:
        """Refuse shards that changed since an earlier process wrote them: they are pending again.

        Those whose bytes this process or one of its peers has checked are not read again.
        """
        inherited = dict(records.items() - self.ledger.checked.items())
        bad = {file for file, digest in digests(self.storage, inherited) if digest != records[file].digest}
        bad |= records.keys() - on_disk(self.path, records).keys()
        if bad:
            self.forget(bad)
            raise StoreError(
                f"{', '.join(sorted(bad))} changed since they were written",
                "files that no other program changes",
                "run `lftpipe extract --resume`: only these are written again",
            )

    @property
    def _computed(self) -> list[ArrayLayout]:
        return [array for array in self.spec.arrays.values() if array.computed]

    def stored(self, key: ShardKey, array: ArrayLayout) -> int:
        """How many sequences of this shard are on disk."""
        record = self.ledger.records.get(array.file(key.split, key.index))
        return record.sequences if record else 0

    def _begin(self, resume: bool, force: bool, repair: Report | None, recheck: bool) -> None:
        if force:
            opening.clear(self.path)
        found = opening.find(self.path, self.spec, resume=resume, repair=repair, recheck=recheck)
        self.spec, self.complete = found.spec, found.complete
        self.ledger = Ledger(self.path, self.storage, found.records, found.checked, found.made)
        self.fresh = not (found.records or found.finished)
        if not self.complete:
            self.ledger.begin(self.spec)
            if not found.finished:
                self.storage.delete(MANIFEST)  # a damaged one
                write_metadata(self.storage, metadata(self.spec, complete=False))

    def forget(self, files: set[str]) -> None:
        """Count these shard files as not written."""
        self.ledger.forget(files)


def write_metadata(storage: Writes, files: dict[str, bytes]) -> None:
    """Write the Zarr metadata, the root's last: it says whether the store is complete."""
    for name in sorted(files, key=lambda name: -name.count("/")):
        try:
            same = storage.read(name) == files[name]
        except FileNotFoundError:
            same = False
        if not same:
            storage.write(name, files[name])
