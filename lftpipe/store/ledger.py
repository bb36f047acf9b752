"""What of a store in the making counts as done: its shards' records, and the journal that outlives a kill."""

import threading
from collections.abc import Iterable
from pathlib import Path

from lftpipe.errors import StoreError
from lftpipe.objects import Storage
from lftpipe.store.disk import disk_errors
from lftpipe.store.journal import Journal
from lftpipe.store.layout import ShardKey, StoreSpec
from lftpipe.store.parsing import Records
from lftpipe.store.sealed import Sealed, sync_folders
from lftpipe.store.shard import Record


class Ledger:
    """The records of a store's shards; threads may commit at the same time.

    Parameters
    ----------
    storage
        Its bytes, as the writer has them: a bucket lets one writer in.
    checked
        Those whose bytes need not be read again: this process wrote them, or an earlier one checked them.
    made
        Of a rolling store, all that were ever made: one that was dropped must be the same again.
    """

    def __init__(
        self, path: Path, storage: Storage, records: Records, checked: Records, made: Records | None = None
    ) -> None:
        self.records, self.checked, self.made = records, checked, made or {}
        self._path, self._storage = path, storage
        self._journal: Journal | None = None
        self._rolling = False
        self._commits = threading.Lock()

    def begin(self, spec: StoreSpec) -> None:
        """Begin the journal anew, with the records so far."""
        with self._commits:
            if self._journal is not None:
                self._journal.close()  # it stays ours, also where the new one cannot be begun
            self._journal = Journal(self._storage, spec, {**self.made, **self.records})
            self._rolling = bool(spec.rolling)

    def close(self) -> None:
        """Let go of the journal, which stays as it is."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @property
    def is_open(self) -> bool:
        """Whether shards can be taken: the store is not complete."""
        return self._journal is not None

    def take(self, *sealed: Sealed) -> int:
        """Take shards that were produced: into the journal first, then by name.

        One that is known already, and one whose files are not there as they were written, are refused:
        they change no byte, and nothing of them remains.

        Raises
        ------
        StoreError
            If the disk is full, or a shard that was dropped is not the same again: those that are not taken
            are gone then.
        """
        assert self._journal is not None, "a complete store takes no shards"
        with self._commits, disk_errors(self._path):
            taken: dict[ShardKey, Sealed] = {}
            for each in sealed:
                if each.key not in taken and self._wants(each):
                    taken[each.key] = each
                else:
                    each.discard(self._path)
            records = {file: record for each in taken.values() for file, record in each.records.items()}
            try:
                self._compare(records)
                if news := dict(records.items() - self.made.items()):
                    self._journal.append(news)
            except BaseException:
                for each in taken.values():
                    each.discard(self._path)
                raise
            sync_folders({folder for each in taken.values() for folder in each.name(self._path)})
            self._storage.take(self._path, records)
            self.records.update(records)
            self.checked.update(records)
            if self._rolling:
                self.made.update(records)
        return len(taken)

    def _compare(self, records: Records) -> None:
        """A shard that was dropped is the same when it is made again, or runs would see other states."""
        for file, record in records.items():
            before = self.made.get(file)
            if before and before.sequences == record.sequences and before.digest != record.digest:
                raise StoreError(
                    f"{file} of {self._path}, made again with other bytes than before",
                    "the same bytes: same machine, versions, --device and --threads",
                    "go on as the store was begun, or start it and its runs over (--force)",
                )

    def drop(self, files: Iterable[str]) -> None:
        """Delete shard files that can be made again; what they were like is remembered."""
        with self._commits:
            for file in files:
                self._storage.delete(file)
                self.records.pop(file, None)
                self.checked.pop(file, None)

    def _wants(self, sealed: Sealed) -> bool:
        """Whether a file of it is news, and all are there."""
        known = {file: old.sequences for file in sealed.records if (old := self.records.get(file))}
        news = any(known.get(file, 0) < record.sequences for file, record in sealed.records.items())
        return news and sealed.is_there(self._path)

    def forget(self, files: set[str]) -> None:
        """Count these shard files as not written."""
        assert self._journal is not None, "nothing is pending in a complete store"
        lost = {file: Record(0, 0, "") for file in files}
        with self._commits:
            self.records.update(lost)
            for file in lost:
                self.made.pop(file, None)
            self._journal.append(lost)
