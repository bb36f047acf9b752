"""Files that appear whole or not at all, and digests of their bytes (xxh3-128, as `sealed.py` has it)."""

import os
from pathlib import Path

import xxhash

_READ_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, 32 hex digits, read in pieces of 1 MiB."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames and new names within a folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Write a file so that at every moment it is either the old one or the new one, also after a crash.

    Parameters
    ----------
    keep
        Where the old one goes, in the same folder; at every moment one of the two is there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
