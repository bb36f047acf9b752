"""The manifest of a store, and the folders that are lftpipe's own: nothing else is overwritten."""

from pathlib import Path
from typing import NamedTuple

import xxhash

from lftpipe.base.errors import StoreError
from lftpipe.base.files import fingerprint, sealed, unsealed
from lftpipe.storage import Reads, storage_of, writable_storage_of
from lftpipe.storage.lease import LEASE
from lftpipe.store.layout import JOURNAL, LOCK, MANIFEST, PLAN, StoreSpec
from lftpipe.store.records import (
    Records,
    check_shards,
    parse_metadata,
    parse_records,
    parse_spec,
    progress,
    read_journal,
)
from lftpipe.store.shard import Record
from lftpipe.store.windows import PRODUCER, READERS

# --- Whether a folder is a store, by what its files say, whole or damaged: other things have a manifest too.

#: In every manifest, every `zarr.json` and every journal of a store, and in nothing else of ours.
_MARK = b'"sequences_per_shard"'

_METADATA = "zarr.json"
_OURS = {MANIFEST, JOURNAL, PLAN, LOCK, LEASE, PRODUCER, READERS, _METADATA, "train", "validation"}


def refuse_other(path: Path, *, replace: bool = False) -> None:
    """Refuse a folder that holds something, and no store.

    `replace`: whether all that is in it is to be deleted: then a store with a file that is not ours is
    refused too.
    """
    storage = storage_of(path)
    names, log = names_beside_log(storage), storage.read_log()
    foreign = {name for name in names if name not in _OURS and not name.endswith(".partial")}
    foreign -= {name for name in names if name.startswith("part-")}
    told = b"".join([log or b"", *(_content(storage, name) for name in (MANIFEST, _METADATA))])
    if (names or log) and _MARK not in told:
        expected, do = ("a store to replace", "delete it yourself") if replace else _ELSEWHERE
        raise StoreError(f"{path} holds {min(foreign or names or {JOURNAL})} and no store", expected, do)
    if replace and foreign:
        given = f"{path}, a store with {min(foreign)} in it, which is not lftpipe's"
        raise StoreError(given, "a store alone", "move that file, or name another --store")


_ELSEWHERE = ("a store or an empty folder", "name another --store")


def names_beside_log(storage: Reads) -> set[str]:
    """What is there beside the log, but for what a writer that was killed at its very first write leaves."""
    return {
        name
        for name in storage.names() - {LOCK, LEASE, PRODUCER, JOURNAL, f"{JOURNAL}.partial"}
        if not name.startswith("journal.0")
    }


def _content(storage: Reads, name: str) -> bytes:
    try:
        return storage.read(name)
    except (FileNotFoundError, IsADirectoryError):
        return b""


# --- The manifest: what a finished store is made of.


class Manifest(NamedTuple):
    """What a finished store is made of."""

    spec: StoreSpec
    shards: Records
    metadata: Records  # the zarr.json files
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """None if there is none; ValueError if it is damaged."""
        try:
            value = unsealed(storage_of(path).read(MANIFEST), str(path / MANIFEST))
        except FileNotFoundError:
            return None
        try:
            spec, shards = parse_spec(value["spec"]), parse_records(value["shards"])
            check_shards(spec, shards)
            metadata, made = parse_metadata(value["metadata"]), value["fingerprint"]
            if made != _fingerprint(spec, shards):
                raise ValueError("its fingerprint is another store's")
        except KeyError as error:
            raise ValueError(f"{path / MANIFEST} is damaged: it has no {error}") from None
        except ValueError as error:
            raise ValueError(f"{path / MANIFEST} is damaged: {error}") from None
        return cls(spec, shards, metadata, made)

    @classmethod
    def write(cls, path: Path, spec: StoreSpec, shards: Records, metadata: Records) -> None:
        """The fingerprint is over identity and shards: equal stores have equal ones, whenever made."""
        value = {
            "spec": spec.to_json(),
            "shards": shards,
            "metadata": metadata,
            "fingerprint": _fingerprint(spec, shards),
        }
        writable_storage_of(path).write(MANIFEST, sealed(value))


def describe(data: bytes) -> Record:
    """The record of a small file written whole."""
    return Record(0, len(data), xxhash.xxh3_128_hexdigest(data))


def planned_spec(path: Path) -> StoreSpec | None:
    """What a store, finished or not, was last meant to hold; None if there is none, or it is damaged."""
    try:
        if journal := read_journal(path):
            return journal[0]
        manifest = Manifest.read(path)
    except ValueError:
        return None
    return manifest.spec if manifest else None


def _fingerprint(spec: StoreSpec, shards: Records) -> str:
    """Over all but details, which say how it was made, and tails, which follow from the digests."""
    return fingerprint([spec.content, {file: record[:3] for file, record in shards.items()}])


def finished_manifest(path: Path) -> Manifest:
    """The manifest of a store that can be read.

    Raises `StoreError` if the store is missing, incomplete or its manifest is damaged.
    """
    try:
        manifest = Manifest.read(path)
        done = progress(path) if manifest is None else None
    except ValueError as error:
        refuse_other(path)
        raise StoreError(
            str(error), "an undamaged store", "run `lftpipe verify`, then `lftpipe extract --repair`"
        ) from None
    rolling = manifest is None and (spec := planned_spec(path)) is not None and spec.rolling
    if done is not None and rolling:
        raise StoreError(
            f"{path}, a rolling store whose validation states are not all there yet",
            "a store that runs can begin on",
            "wait until `lftpipe extract --rolling` says that they can",
        )
    if done is not None:
        raise StoreError(
            f"{path}: store holds {done[0]} of {done[1]} shards",
            "a complete store",
            "run `lftpipe extract --resume`",
        )
    if manifest is None:
        raise StoreError(f"{path}: there is no store", "a complete store", "run `lftpipe extract`")
    return manifest


def newest_record(path: Path, file: str) -> Record | None:
    """What the journal, or else the manifest, says of a shard file now; None if neither knows it.

    In this order: a store that grows has its manifest before it loses its journal.
    """
    try:
        for shards in (journal[1] if (journal := read_journal(path)) else {}, _shards_of(path)):
            if file in shards:
                return shards[file]
    except ValueError:
        pass
    return None


def _shards_of(path: Path) -> Records:
    manifest = Manifest.read(path)
    return manifest.shards if manifest else {}
