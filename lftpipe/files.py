"""Fingerprints, file digests, and files that appear whole or not at all.

Everything here speaks JSON-plain values (dict with text keys, list, text, number, bool, None).
Digests are xxh3-128: they find accidents of disks and copies, not forgers.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.json_text import canonical, canonical_texts, sealed_texts

_READ_BYTES = 1 << 20


def plain(value: Any) -> Any:
    """The value as it will come back from a file: tuples become lists, keys text.

    Parameters
    ----------
    value
        A JSON-plain value; tuples and keys that are no text are allowed.
    """
    return json.loads(canonical(value))


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text that anyone may have written.

    Parameters
    ----------
    data
        The text.

    Raises
    ------
    ValueError
        If it is none, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def fingerprint(value: Any) -> str:
    """Digest of a JSON-plain value, 32 hex digits; the order of keys does not matter.

    Parameters
    ----------
    value
        A JSON-plain value.
    """
    digest = xxhash.xxh3_128()
    for text in canonical_texts(value):
        digest.update(text)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, 32 hex digits, read in pieces of 1 MiB.

    Parameters
    ----------
    path
        The file.
    """
    digest, buffer = xxhash.xxh3_128(), bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames and new names within a folder survive a power failure.

    Parameters
    ----------
    path
        The folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Write a file so that at every moment it is either the old one or the new one, also after a crash.

    Parameters
    ----------
    path
        The file; its folder must exist.
    data
        Its whole new content.
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


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a digest of itself under ``digest``, atomically.

    Parameters
    ----------
    path
        The file; its folder must exist.
    value
        A JSON-plain object without the key ``digest``.
    """
    write_atomic(path, sealed(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a single byte of it is not as it was written.
    """
    return unsealed(path.read_bytes(), str(path))


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """What was sealed, without its digest.

    Parameters
    ----------
    data
        What `sealed` gave.
    name
        Of the file, for the error.

    Raises
    ------
    ValueError
        If a single byte of it is not as it was written.
    """
    try:
        value = json.loads(data)
        if value.get("digest") == fingerprint({key: value[key] for key in value if key != "digest"}):
            place, view = 0, memoryview(data)
            for text in sealed_texts(value):
                if view[place : place + len(text)] != text:
                    break
                place += len(text)
            else:
                if place == len(data):
                    del value["digest"]
                    return value
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{name} is damaged: its digest does not match its content")


def sealed(value: dict[str, Any]) -> bytes:
    """The JSON text of an object, with a digest of it under ``digest``.

    Parameters
    ----------
    value
        A JSON-plain object without the key ``digest``.
    """
    return b"".join(sealed_texts({**value, "digest": fingerprint(value)}))


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself under ``digest``, however it is then laid out.

    Parameters
    ----------
    value
        A JSON-plain object without the key ``digest``.
    """
    return {**value, "digest": fingerprint(value)}


def unseal(value: dict[str, Any]) -> dict[str, Any]:
    """The object that `seal` was given; one without a digest as it is.

    Parameters
    ----------
    value
        What `seal` gave.

    Raises
    ------
    ValueError
        If it is not as it was sealed.
    """
    rest = {key: entry for key, entry in value.items() if key != "digest"}
    if "digest" in value and value["digest"] != fingerprint(rest):
        raise ValueError("its digest does not match its content")
    return rest


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Every setting in which two JSON-plain values differ, as ``teacher.revision: 'a' -> 'b'``.

    Parameters
    ----------
    old
        A JSON-plain value.
    new
        The value to compare it with.
    name
        What the two are called; the names of settings begin with it.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r} -> {new!r}"
