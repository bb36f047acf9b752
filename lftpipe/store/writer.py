"""Writing a store: shard by shard, resumable at any moment, complete only when all is on disk and checked."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int32

from lftpipe.errors import StoreError
from lftpipe.files import file_digest, sync_folder, write_atomic
from lftpipe.store import journal as books
from lftpipe.store import resume as opening
from lftpipe.store.journal import Journal, Manifest, Records
from lftpipe.store.layout import JOURNAL, MANIFEST, ArrayLayout, ShardKey, StoreSpec, metadata
from lftpipe.store.shard import ChunkReader, DamagedShardError, Record
from lftpipe.store.shard_writer import ShardWriter
from lftpipe.store.verify import Report


class StoreWriter:
    """The one writer of a store, from `open` to the end of the ``with`` block.

    Attributes
    ----------
    complete
        Whether everything the specification asks for is on disk and checked.
    """

    def __init__(self, path: Path, spec: StoreSpec, lock: int) -> None:
        """Use `open`."""
        self.path, self.spec, self.complete = path, spec, False
        self._lock = lock
        self._journal: Journal | None = None
        self._records: Records = {}  # all shards that count as done
        self._checked: Records = {}  # those whose bytes this process wrote, or an earlier `finish` read
        self._commits = threading.Lock()
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
    ) -> "StoreWriter":
        """Begin a store, go on with an incomplete one, add sequences to a complete one, or repair one.

        Parameters
        ----------
        resume
            Whether an existing store may be gone on with.
        force
            Delete an existing store and begin anew.
        repair
            What `verify_store` found: these files count as not written.

        Raises
        ------
        StoreError
            If another process writes it, its identity differs, it holds more than asked for, or ``path``
            cannot be written or holds something else.
        """
        with books.disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self = cls(path, spec, books.take_lock(path))
            try:
                self._begin(resume, force, repair)
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
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def pending(self) -> list[ShardKey]:
        """The shards whose states are still to be computed, in order."""
        todo = []
        for key in self.spec.shard_keys():
            stored = min(self._stored(key, array) for array in self._computed)
            if stored < len(key.sequences):
                todo.append(ShardKey(key.split, key.index, key.sequences[stored:]))
        return todo

    @contextmanager
    def shard(self, key: ShardKey) -> Iterator[ShardWriter]:
        """Write one pending shard: it counts when the block ends; an error within leaves nothing behind."""
        with self._writing(key, self._computed) as shard:
            yield shard

    def put_tokens(
        self,
        split: str,
        tokens: Int32[np.ndarray, "sequence position"],
        document: Int32[np.ndarray, "sequence position"],
        first: int = 0,
    ) -> None:
        """Store the tokens of a split, all at once or piece by piece.

        Parameters
        ----------
        first
            Index of the first sequence given; all before it, back to the last multiple of
            `sequences_per_shard`, must be stored. It ends at such a multiple or with the split.

        Raises
        ------
        StoreError
            If other tokens are stored already: the store was made from another corpus or tokenizer.
        """
        stop = first + len(tokens)
        for key in self.spec.shard_keys():
            begin, end = max(first, key.sequences.start), min(stop, key.sequences.stop)
            if key.split == split and begin < end:
                part = slice(begin - first, end - first)
                self._put_tokens(key, begin, {"tokens": tokens[part], "document": document[part]})

    def note(self, **details: Any) -> None:
        """Record details of a store in the making; whoever resumes it finds them in its specification."""
        assert self._journal is not None, "a complete store takes no notes"
        with books.disk_errors(self.path), self._commits:
            self.spec = replace(self.spec, details={**self.spec.details, **details})
            self._journal.close()
            self._journal = Journal(self.path, self.spec, self._records)

    def finish(self) -> None:
        """Check everything on disk, then declare the store complete.

        Raises
        ------
        StoreError
            If shards are missing, or one that an earlier process wrote has changed since: then it is pending
            again.
        """
        if self.complete:
            return
        with books.disk_errors(self.path):
            self._check()
            files = metadata(self.spec, complete=True)
            self._write_metadata(files)
            described = {name: books.describe(data) for name, data in files.items()}
            Manifest.write(self.path, self.spec, dict(sorted(self._records.items())), described)
            (self.path / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.path)
        self.complete = True

    @property
    def _computed(self) -> list[ArrayLayout]:
        return [array for array in self.spec.arrays.values() if array.computed]

    def _stored(self, key: ShardKey, array: ArrayLayout) -> int:
        """How many sequences of this shard are on disk."""
        record = self._records.get(array.file(key.split, key.index))
        return record.sequences if record else 0

    def _begin(self, resume: bool, force: bool, repair: Report | None) -> None:
        if force:
            opening.clear(self.path)
        manifest, old = opening.existing(self.path, self.spec, salvage=repair is not None)
        if old:
            if not resume:
                raise StoreError(
                    f"{self.path} exists", "a new store", "go on with it (--resume) or begin anew (--force)"
                )
            opening.refuse_changes(self.path, old[0], self.spec)
            # Details that are not given anew stay: an earlier run may have noted them.
            self.spec = replace(self.spec, details={**old[0].details, **self.spec.details})
            damaged = {damage.file for damage in repair.damaged} if repair else set()
            kept = {file: record for file, record in old[1].items() if file not in damaged}
            books.settle(self.path, kept)
            self._records = books.on_disk(self.path, kept)
            if manifest:
                self._checked = dict(self._records.items() & manifest.shards.items())
                same = manifest.spec.sequences == self.spec.sequences and self._records == manifest.shards
                self.complete = same and not damaged and not Journal.exists(self.path)
        if not self.complete:
            self._journal = Journal(self.path, self.spec, self._records)
            if manifest is None:
                (self.path / MANIFEST).unlink(missing_ok=True)  # a damaged one
                self._write_metadata(metadata(self.spec, complete=False))

    @contextmanager
    def _writing(self, key: ShardKey, arrays: list[ArrayLayout]) -> Iterator[ShardWriter]:
        assert self._journal is not None, "nothing is pending in a complete store"
        shard = ShardWriter(self.path, key, arrays, self.spec.sequences_per_shard, self._free)
        try:
            shard.begin()
            yield shard
            with books.disk_errors(self.path):
                records = shard.seal()
                with self._commits:
                    self._journal.append(records)
        except BaseException:
            shard.discard()
            raise
        with books.disk_errors(self.path):
            shard.publish()
        with self._commits:
            self._records.update(records)
            self._checked.update(records)

    def _put_tokens(self, key: ShardKey, begin: int, parts: dict[str, np.ndarray]) -> None:
        """Store one shard's tokens from sequence ``begin`` on, and compare those that are stored already."""
        arrays = [self.spec.arrays[name] for name in parts]
        origin = key.sequences.start
        try:
            stored = min(self._stored(key, array) for array in arrays)
            for array in arrays:
                self._compare_tokens(
                    array, key, parts[array.name][: max(origin + stored - begin, 0)], begin - origin
                )
        except (DamagedShardError, FileNotFoundError) as error:
            if self.complete:
                raise StoreError(
                    str(error), "a store as it was written", "run `lftpipe extract --repair`"
                ) from None
            stored = 0
        if stored == len(key.sequences):
            return
        rest = key.sequences[stored:]
        if begin > rest.start:
            raise ValueError(
                f"tokens of {key.split} sequence {rest.start} must be put before those of {begin}"
            )
        with self._writing(ShardKey(key.split, key.index, rest), arrays) as shard:
            for name, part in parts.items():
                shard.put(name, None, 0, part[rest.start - begin :])

    def _compare_tokens(self, array: ArrayLayout, key: ShardKey, given: np.ndarray, within: int) -> None:
        if not len(given):
            return
        reader = ChunkReader(self.path / array.file(key.split, key.index), array.chunks_per_shard)
        stored = np.empty(array.chunk, array.dtype)
        for chunk, row in enumerate(given, start=within):
            if not np.array_equal(reader.read(chunk, stored), row):
                sequence = key.sequences.start + chunk
                raise StoreError(
                    f"{array.name} of {key.split} sequence {sequence} are not the stored ones",
                    "the corpus and the tokenizer the store was begun with",
                    "give those, name another --store, or begin anew (--force)",
                )

    def _check(self) -> None:
        """Everything that must be there is there, and what an earlier process wrote is what it wrote."""
        if todo := self.pending():
            raise StoreError(
                f"{len(todo)} shards of {self.path} are not written",
                "all of them",
                "run `lftpipe extract --resume`",
            )
        for key in self.spec.shard_keys():
            for array in self.spec.arrays.values():
                if self._stored(key, array) < len(key.sequences):
                    raise ValueError(f"{array.name} of {key.split} shard {key.index} was never put")
        inherited = dict(self._records.items() - self._checked.items())
        bad = {file for file, record in inherited.items() if file_digest(self.path / file) != record.digest}
        bad |= self._records.keys() - books.on_disk(self.path, self._records).keys()
        if bad:
            lost = {file: Record(0, 0, "") for file in bad}
            self._records.update(lost)
            assert self._journal is not None
            self._journal.append(lost)
            raise StoreError(
                f"{', '.join(sorted(bad))} changed since they were written",
                "files that nobody touches",
                "run `lftpipe extract --resume`: only these are written again",
            )

    def _write_metadata(self, files: dict[str, bytes]) -> None:
        """The root's file comes last: it says whether the store is complete."""
        for name in sorted(files, key=lambda name: -name.count("/")):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != files[name]:
                write_atomic(target, files[name])
