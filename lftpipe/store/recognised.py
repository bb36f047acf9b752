"""Whether a folder is a store, by what its files say, whole or damaged: other things have a manifest too."""

from pathlib import Path

from lftpipe.errors import StoreError
from lftpipe.objects import Storage, storage_of
from lftpipe.objects.lease import LEASE
from lftpipe.store.layout import JOURNAL, LOCK, MANIFEST, PLAN
from lftpipe.store.rolling_files import PRODUCER, READERS

#: In every manifest, every `zarr.json` and every journal of a store, and in nothing else of ours.
_MARK = b'"sequences_per_shard"'

_METADATA = "zarr.json"
_OURS = {MANIFEST, JOURNAL, PLAN, LOCK, LEASE, PRODUCER, READERS, _METADATA, "train", "validation"}


def refuse_other(path: Path, *, replace: bool = False) -> None:
    """Refuse a folder that holds something, and no store.

    Parameters
    ----------
    replace
        Whether all that is in it is to be deleted: then a store with a file that is not ours is refused too.
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


def names_beside_log(storage: Storage) -> set[str]:
    """What is there beside the log, but for what a writer that was killed at its very first write leaves."""
    return {
        name
        for name in storage.names() - {LOCK, LEASE, PRODUCER, JOURNAL, f"{JOURNAL}.partial"}
        if not name.startswith("journal.0")
    }


def _content(storage: Storage, name: str) -> bytes:
    try:
        return storage.read(name)
    except (FileNotFoundError, IsADirectoryError):
        return b""
