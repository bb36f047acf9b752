"""What is decided when a store is opened for writing: is it ours, is it the same, what of it can be kept."""

import shutil
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from lftpipe.base.errors import StoreError
from lftpipe.base.files import differences, parse_json
from lftpipe.storage import storage_of, writable_storage_of
from lftpipe.store.commit_log import clear_leftovers, settle
from lftpipe.store.layout import MANIFEST, StoreSpec
from lftpipe.store.manifest import Manifest, names_beside_log, refuse_other
from lftpipe.store.records import Records, has_journal, on_disk, parse_spec, read_journal
from lftpipe.store.shard import ChunkReader, DamagedShardError, Record
from lftpipe.store.verify import Report


class Found(NamedTuple):
    """How a writer begins."""

    spec: StoreSpec
    """With the details that an earlier run noted."""
    records: Records
    """Of the shards that count as done."""
    made: Records
    """Of a rolling store: also of those that were dropped since."""
    checked: Records
    """Those that an earlier `StoreWriter.finish` read."""
    finished: bool
    """Whether there is a complete store, which may be smaller."""
    complete: bool
    """Whether it is all that is asked for."""


def find(path: Path, spec: StoreSpec, *, resume: bool, repair: Report | None, recheck: bool) -> Found:
    """What is there of the store that is asked for; shards that lack their names get them.

    Raises `StoreError` if what is there may not be gone on with.
    """
    refuse_other(path)
    manifest, old = _existing(path, spec, salvage=repair is not None)
    if not old:
        return Found(spec, {}, {}, {}, False, False)
    if not resume:
        raise StoreError(f"{path} exists", "a new store", "continue it (--resume) or start over (--force)")
    refuse_changes(path, old[0], spec)
    if old[0].details.get("asked") == spec.sequences and not recheck:
        spec = replace(spec, sequences=old[0].sequences)
    # Details that are not given anew stay: an earlier run may have noted them.
    spec = replace(spec, details={**old[0].details, **spec.details})
    damaged = {damage.file for damage in repair.damaged} if repair else set()
    kept = {file: record for file, record in old[1].items() if file not in damaged}
    settle(path, kept)
    records = on_disk(path, kept)
    made = {file: record for file, record in kept.items() if record.sequences} if spec.rolling else {}
    if not manifest:
        return Found(spec, records, made, {}, False, False)
    if spec.rolling and manifest.spec.sequences != spec.sequences:
        raise StoreError(
            f"{spec.sequences} sequences for the rolling store {path} of {manifest.spec.sequences}",
            "as many as it has: its windows are part of the order of training",
            "ask for the same --tokens, name another --store, or start over (--force)",
        )
    checked = dict(records.items() & manifest.shards.items())
    same = manifest.spec.sequences == spec.sequences and records == manifest.shards
    complete = same and not damaged and not has_journal(path)
    return Found(spec, records, made, checked, True, complete)


def _existing(
    path: Path, spec: StoreSpec, *, salvage: bool
) -> tuple[Manifest | None, tuple[StoreSpec, Records] | None]:
    """The manifest, if the store was finished, and what it was last meant to hold and holds.

    `salvage`: whether to read every shard where the manifest or the journal is damaged or missing.
    Raises `StoreError` if they are damaged and not to be salvaged.
    """
    try:
        manifest, journal = Manifest.read(path), read_journal(path)
    except ValueError as error:
        if salvage:
            return None, _salvage(path, spec)
        raise StoreError(
            str(error), "an undamaged store", "repair it (--repair) or start over (--force)"
        ) from None
    if manifest is None and journal is None and names_beside_log(storage_of(path)):
        if salvage:
            return None, _salvage(path, spec)
        raise StoreError(f"{path} without its manifest", "a whole store", "repair it (--repair)")
    return manifest, journal or (manifest and (manifest.spec, manifest.shards))


def _salvage(path: Path, spec: StoreSpec) -> tuple[StoreSpec, Records]:
    """What the Zarr metadata says and the shards' own checksums confirm."""
    storage = storage_of(path)
    try:
        attributes = parse_json(storage.read("zarr.json"))["attributes"]
        own = {field.name for field in fields(StoreSpec)} & attributes.keys() | {"schema_version"}
        identity = {key: attributes.get(key) for key in spec.identity}
        details = attributes.keys() - own - identity.keys() - {"complete"}
        old = parse_spec(
            {key: attributes[key] for key in own}
            | {"identity": identity, "details": {key: attributes[key] for key in details}}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(
            f"manifest and metadata of {path} are both damaged", "one of them whole", "start over (--force)"
        ) from None
    refuse_changes(path, old, spec)
    records: Records = {}
    for key in old.shard_keys():
        for array in old.arrays.values():
            file = array.file(key.split, key.index)
            with suppress(DamagedShardError, FileNotFoundError):
                shard = ChunkReader(storage, file, array.chunks_per_shard)
                shard.check(
                    [
                        array.chunk_number(layer, i)
                        for layer in array.layers or (None,)
                        for i in range(len(key.sequences))
                    ]
                )
                records[file] = Record(len(key.sequences), shard.size, storage.digest(file), shard.tail)
    return old, records


def refuse_changes(path: Path, old: StoreSpec, new: StoreSpec) -> None:
    """A store never mixes settings, and never shrinks."""
    if changed := list(differences(old.fixed, new.fixed)):
        raise StoreError(
            f"{path} was made with other settings: {'; '.join(changed)}",
            "the settings it was made with",
            "use those, name another --store, or start over (--force)",
        )
    for split in sorted(old.sequences.keys() | new.sequences.keys()):
        had, wanted = old.sequences.get(split, 0), new.sequences.get(split, 0)
        if wanted < had:
            raise StoreError(
                f"{wanted} {split} sequences, of a store of {had}",
                "as many or more",
                "ask for more tokens, name another --store, or start over (--force)",
            )


def clear(path: Path) -> None:
    """Delete the store; never a folder that is not one."""
    refuse_other(path, replace=True)
    storage = writable_storage_of(path)
    names = names_beside_log(storage)
    if not names and storage.read_log() is None:
        return
    try:
        storage.begin_log(b"")  # goes last: until then this is a store, and an unusable one
        for name in sorted(names, key=lambda name: name != MANIFEST):
            storage.delete(name)
        storage.remove_log()
    finally:
        storage.close()
    if storage.remote:
        clear_leftovers(path)


def abandon(path: Path) -> None:
    """Delete a store that was begun for nothing; one that was ever finished stays."""
    if MANIFEST not in storage_of(path).names():
        clear(path)
        shutil.rmtree(path)
