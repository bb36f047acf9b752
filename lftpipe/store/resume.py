"""What is decided when a store is opened for writing: is it ours, is it the same, what of it can be kept."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lftpipe.errors import StoreError
from lftpipe.files import differences, file_digest
from lftpipe.store.journal import Journal, Manifest, Records
from lftpipe.store.layout import JOURNAL, LOCK, MANIFEST, StoreSpec, root_attributes
from lftpipe.store.shard import ChunkReader, DamagedShardError, Record


def existing(
    path: Path, spec: StoreSpec, *, salvage: bool
) -> tuple[Manifest | None, tuple[StoreSpec, Records] | None]:
    """The manifest, if the store was finished, and what it was last meant to hold and holds.

    Parameters
    ----------
    salvage
        Whether to read every shard where the manifest or the journal is damaged or missing.

    Raises
    ------
    StoreError
        If they are damaged and not to be salvaged, or the folder holds something else.
    """
    try:
        manifest, journal = Manifest.read(path), Journal.read(path)
    except ValueError as error:
        if salvage:
            return None, _salvage(path, spec)
        raise StoreError(
            str(error), "a store as it was written", "repair it (--repair) or begin anew (--force)"
        ) from None
    if manifest is None and journal is None and (foreign := _names(path)):
        if salvage and "zarr.json" in foreign:
            return None, _salvage(path, spec)
        if "zarr.json" in foreign:
            raise StoreError(f"{path} without its manifest", "a whole store", "repair it (--repair)")
        raise StoreError(
            f"{path} holds {min(foreign)} and no store", "a store or an empty folder", "name another --store"
        )
    return manifest, journal or (manifest and (manifest.spec, manifest.shards))


def _salvage(path: Path, spec: StoreSpec) -> tuple[StoreSpec, Records]:
    """What the Zarr metadata says and the shards' own checksums confirm."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        given = root_attributes(spec)
        own = given.keys() - spec.details.keys() | {"complete", "logits"}
        details = {key: value for key, value in attributes.items() if key not in own}
        old = replace(spec, sequences=attributes["sequences"], details=details)
        free = spec.details.keys() | {"sequences"}
        attributes, given = (
            {key: each.get(key) for key in (given.keys() | {"logits"}) - free} for each in (attributes, given)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(
            f"manifest and metadata of {path} are both damaged", "one of them whole", "begin anew (--force)"
        ) from None
    if changed := list(differences(attributes, given)):
        raise _changed(path, changed)
    records: Records = {}
    for key in old.shard_keys():
        for array in old.arrays.values():
            file = path / array.file(key.split, key.index)
            with suppress(DamagedShardError, FileNotFoundError):
                shard = ChunkReader(file, array.chunks_per_shard)
                shard.check(
                    [
                        array.chunk_number(layer, i)
                        for layer in array.layers or (None,)
                        for i in range(len(key.sequences))
                    ]
                )
                records[array.file(key.split, key.index)] = Record(
                    len(key.sequences), shard.size, file_digest(file)
                )
    return old, records


def refuse_changes(path: Path, old: StoreSpec, new: StoreSpec) -> None:
    """A store never mixes settings, and never shrinks.

    Raises
    ------
    StoreError
        Naming every setting that differs.
    """
    theirs, ours = old.to_json(), new.to_json()
    for free in ("sequences", "details"):
        del theirs[free], ours[free]
    if changed := list(differences(theirs, ours)):
        raise _changed(path, changed)
    for split in sorted(old.sequences.keys() | new.sequences.keys()):
        had, wanted = old.sequences.get(split, 0), new.sequences.get(split, 0)
        if wanted < had:
            raise StoreError(
                f"{wanted} {split} sequences, of a store of {had}",
                "as many or more",
                "ask for more tokens, name another --store, or begin anew (--force)",
            )


def clear(path: Path) -> None:
    """Delete the store; never a folder that is not one."""
    names = _names(path)
    if not names:
        return
    if not names & {MANIFEST, JOURNAL}:
        raise StoreError(
            f"{path} holds {min(names)} and no store", "a store to replace", "delete it yourself"
        )
    (path / JOURNAL).write_bytes(b"")  # goes last: until then this is a store, and an unusable one
    for name in sorted(names | {JOURNAL}, key=lambda name: (name == JOURNAL, name != MANIFEST)):
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def _changed(path: Path, changed: list[str]) -> StoreError:
    return StoreError(
        f"{path} was made with other settings: {'; '.join(changed)}",
        "the settings it was made with",
        "give those, name another --store, or begin anew (--force)",
    )


def _names(path: Path) -> set[str]:
    """What is in the folder, but for what a writer that was killed at its very first write leaves."""
    return {entry.name for entry in path.iterdir()} - {LOCK, f"{JOURNAL}.partial"}
