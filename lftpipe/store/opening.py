"""What is decided when a store is opened for writing: is it ours, is it the same, what of it can be kept."""

import shutil
from pathlib import Path

from lftpipe.errors import StoreError
from lftpipe.manifest import differences
from lftpipe.store.journal import Journal, Manifest
from lftpipe.store.layout import JOURNAL, LOCK, MANIFEST, StoreSpec


def existing(path: Path) -> tuple[Manifest | None, tuple[StoreSpec, dict] | None]:
    """The manifest of a finished store, the journal of one in the making; both while a finished one grows.

    Raises
    ------
    StoreError
        If either is damaged, or the folder holds something else.
    """
    try:
        manifest, journal = Manifest.read(path), Journal.read(path)
    except ValueError as error:
        raise StoreError(
            str(error), "a store as it was written", "repair it (--repair) or begin anew (--force)"
        ) from None
    if manifest is None and journal is None and (foreign := _names(path)):
        raise StoreError(
            f"{path} holds {min(foreign)} and no store", "a store or an empty folder", "name another --store"
        )
    return manifest, journal


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
        raise StoreError(
            f"{path} was made with other settings: {'; '.join(changed)}",
            "the settings it was made with",
            "give those, name another --store, or begin anew (--force)",
        )
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


def _names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} - {LOCK}
