"""JSON-plain values, their fingerprints, and files that are sealed with one.

JSON-plain are dict with text keys, list, text, number, bool and None. Digests are xxh3-128: they find
accidents of disks and copies, not forgers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.files.atomic import write_atomic
from lftpipe.files.json_text import canonical, canonical_texts, sealed_texts


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
    """Digest of a JSON-plain value, 32 hex digits; the order of keys does not matter."""
    digest = xxhash.xxh3_128()
    for text in canonical_texts(value):
        digest.update(text)
    return digest.hexdigest()


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a digest of itself under ``digest``, atomically."""
    write_atomic(path, sealed(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises
    ------
    ValueError
        If a single byte of it is not as it was written.
    """
    return unsealed(path.read_bytes(), str(path))


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """What was sealed, without its digest.

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
    """The JSON text of an object, with a digest of it under ``digest``."""
    return b"".join(sealed_texts({**value, "digest": fingerprint(value)}))


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself under ``digest``, however it is then laid out."""
    return {**value, "digest": fingerprint(value)}


def unseal(value: dict[str, Any]) -> dict[str, Any]:
    """The object that `seal` was given; one without a digest as it is.

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
    name
        What the two are called; the names of settings begin with it.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r} -> {new!r}"
