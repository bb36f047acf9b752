"""Finding every byte of a finished store that is not as it was written."""

from dataclasses import dataclass
from pathlib import Path

from lftpipe.base.errors import StoreError
from lftpipe.storage import Reads, local_path, storage_of
from lftpipe.store.layout import JOURNAL, MANIFEST, ShardKey, StoreSpec
from lftpipe.store.manifest import Manifest, refuse_other
from lftpipe.store.reader import Store
from lftpipe.store.records import Records, digests, has_journal, read_journal
from lftpipe.store.shard import Record
from lftpipe.store.windows import Windows


@dataclass(frozen=True)
class Damage:
    """One file that is not as it was written; array, split and shard are None where it belongs to none."""

    file: str  # relative to the store
    problem: str
    array: str | None = None
    split: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        if self.index is None:
            return f"{self.file}: {self.problem}"
        return f"{self.array} of {self.split}, shard {self.index}: {self.problem} ({self.file})"


@dataclass(frozen=True)
class Report:
    """What `verify_store` read and what is wrong with it; `StoreWriter.open` takes it to repair the store."""

    path: Path
    damaged: tuple[Damage, ...]
    files: int  # checked
    bytes: int  # that they should have
    absent: int | None = None  # of a rolling store: shards that are not there now

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.damaged

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The damaged (split, shard index), in order."""
        return sorted(
            {
                (damage.split, damage.index)
                for damage in self.damaged
                if damage.split is not None and damage.index is not None
            }
        )


def verify_store(path: Path) -> Report:
    """Compare every byte of a complete store with the digests of the manifest.

    A store that is growing is checked too: a shard that was replaced meanwhile is compared with the journal.

    Raises `StoreError` if there is no store, or it is incomplete, or the folder holds something else.
    """
    path = local_path(path)
    storage = storage_of(path)
    try:
        manifest = Manifest.read(path)
    except ValueError as error:
        refuse_other(path)
        return Report(path, (Damage(MANIFEST, str(error)),), 1, 0)
    if manifest is None:
        try:
            Store.open(path)
        except StoreError:
            if has_journal(path) or "zarr.json" not in storage.names():
                raise
        return Report(path, (Damage(MANIFEST, "missing"),), 1, 0)
    damaged = []
    try:
        _, newer = read_journal(path) or (None, {})
    except ValueError as error:
        newer: Records = {}
        if manifest.spec.rolling:  # there it stays, beside the manifest
            damaged.append(Damage(JOURNAL, str(error)))
    places = {
        array.file(key.split, key.index): (array.name, key)
        for key in manifest.spec.shard_keys()
        for array in manifest.spec.arrays.values()
    }
    files = manifest.metadata | manifest.shards
    rolling, absent = _rolling_files(manifest.spec, newer, storage)
    files |= rolling
    sizes = storage.sizes(files)
    for file, digest in digests(storage, files):
        record = files[file]
        if file in rolling and isinstance(digest, FileNotFoundError):
            continue  # dropped just now
        if problem := _problem(sizes.get(file), digest, record, newer.get(file, record)):
            array, key = places.get(file, (None, None))
            damaged.append(_damage(file, problem, array, key))
    size = sum(record.bytes for record in files.values())
    return Report(path, tuple(damaged), len(files) + 1, size, absent)


def _rolling_files(spec: StoreSpec, records: Records, storage: Reads) -> tuple[Records, int | None]:
    """The files of a rolling store that come and go and are there, and how many shards are not."""
    if not spec.rolling:
        return {}, None
    windows = Windows(spec)
    shards = [windows.files(key) for number in range(windows.count) for key in windows.keys(number)]
    made = [file for files in shards for file in files if file in records]
    there = {file: records[file] for file in storage.sizes(made)}
    return there, sum(not there.keys() >= set(files) for files in shards)


def _problem(size: int | None, digest: str | Exception, *allowed: Record) -> str | None:
    if size is None or isinstance(digest, FileNotFoundError):
        return "missing"
    if isinstance(digest, OSError):
        return f"unreadable: {digest.strerror}"
    if size not in {record.bytes for record in allowed}:
        return f"{size} bytes instead of {allowed[0].bytes}"
    if digest not in {record.digest for record in allowed}:
        return "bytes differ from those written"
    return None


def _damage(file: str, problem: str, array: str | None, key: ShardKey | None) -> Damage:
    if key is None:
        return Damage(file, problem)
    return Damage(file, problem, array, key.split, key.index)
