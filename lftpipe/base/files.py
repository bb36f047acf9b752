"""JSON values and files: canonical text, fingerprints, seals, atomic writes. No NumPy, no torch."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import xxhash

# --- Files that appear whole or not at all, and digests of their bytes (xxh3-128, as `sealed.py` has it).

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

    `keep`: where the old one goes, in the same folder; at every moment one of the two is there.
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


# --- How many files a process holds open.

#: Enough for every command, where the system sets no limit that can be asked for (macOS takes no more).
_ENOUGH_FILES = 10_240


def raise_file_limit() -> None:
    """Let this process open as many files as its user may; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # the kernel may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_open_files() -> int:
    """How many files one reader may hold: a quarter of what the process may, at most 256."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(8, min(256, soft // 4))


# --- JSON-plain values as text: one canonical form for digests, one with an indent for files.
#
# Both come in parts, so that a manifest of a million files never lies in memory as a whole twice.

#: Entries of an object that become text at once.
_TOGETHER = 4096

_quoted = json.encoder.encode_basestring


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8.

    Raises `TypeError, ValueError` if the value is not JSON-plain (NaN and infinities are not).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def canonical_texts(value: Any) -> Iterator[bytes]:
    """`canonical` in parts: a store of a million files has hundreds of megabytes of it."""
    if isinstance(value, dict) and len(value) > _TOGETHER:
        keys = sorted(value)
        for first in range(0, len(keys), _TOGETHER):
            some = {key: value[key] for key in keys[first : first + _TOGETHER]}
            yield (b"," if first else b"{") + canonical(some)[1:-1]
        yield b"}"
    elif isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
        for number, key in enumerate(sorted(value)):
            yield (b"," if number else b"{") + canonical(key) + b":"
            yield from canonical_texts(value[key])
        yield b"}"
    elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
        for number, each in enumerate(value):
            yield b"," if number else b"["
            yield from canonical_texts(each)
        yield b"]"
    else:
        yield canonical(value)


def sealed_texts(value: dict[str, Any]) -> Iterator[bytes]:
    """The text that a sealed file holds, in parts: JSON with an indent of 1 and sorted keys."""
    yield b"{"
    for number, key in enumerate(sorted(value)):
        inner = value[key]
        front = f"{',' if number else ''}\n {_quoted(key)}: "
        if isinstance(inner, dict) and len(inner) > _TOGETHER:
            yield (front + "{").encode()
            for place, name in enumerate(sorted(inner)):
                comma = "," if place else ""
                yield f"{comma}\n  {_quoted(name)}: {_indented(inner[name], 2)}".encode()
            yield b"\n }"
        else:
            yield (front + _indented(inner, 1)).encode()
    yield b"\n}\n"


def _indented(value: Any, depth: int) -> str:
    """A part of `json.dumps(value, indent=1)`, whose own code takes five times as long."""
    if isinstance(value, str):
        return _quoted(value)
    if not isinstance(value, dict | list | tuple) or not value:
        return json.dumps(value)
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        texts = [f"{inner}{_quoted(key)}: {_indented(value[key], depth + 1)}" for key in sorted(value)]
        return "{" + ",".join(texts) + outer + "}"
    texts = [
        _quoted(each) if type(each) is str else str(each) if type(each) is int else _indented(each, depth + 1)
        for each in value
    ]
    return f"[{inner}{f',{inner}'.join(texts)}{outer}]"


# --- JSON-plain values, their fingerprints, and files that are sealed with one.
#
# JSON-plain are dict with text keys, list, text, number, bool and None. Digests are xxh3-128: they find
# accidents of disks and copies, not forgers.

#: Largest file that `read_json` reads: the map of 81 states and 4096 tokens has 70 MB.
MOST_BYTES = 2**28


def plain(value: Any) -> Any:
    """The value as it will come back from a file: tuples become lists, keys text.

    `value`: a JSON-plain value; tuples and keys that are no text are allowed.
    """
    return json.loads(canonical(value))


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text that anyone may have written.

    Raises `ValueError` if it is none, has NaN or infinities, or is nested deeper than Python can follow.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse_object(data: bytes, sealed: bool = True) -> dict[str, Any]:
    """A JSON object, and one that is true to the digest that it has where it was sealed."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    rest = {key: entry for key, entry in value.items() if key != "digest"}
    if sealed and value.get("digest") != fingerprint(rest):
        raise ValueError("its digest does not match its content")
    return value


def read_json(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """A JSON object from a file of bounded size; one of ours is true to its digest, which is left out.

    Raises `ValueError` if it is no such object, with the reason.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    value = _parse_object(path.read_bytes(), sealed)
    value.pop("digest", None)
    return value


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

    Raises `ValueError` if a single byte of it is not as it was written.
    """
    return unsealed(path.read_bytes(), str(path))


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """What was sealed, without its digest.

    Raises `ValueError` if a single byte of it is not as it was written.
    """
    with suppress(ValueError, TypeError):
        value, place, view = _parse_object(data), 0, memoryview(data)
        for text in sealed_texts(value):
            if view[place : place + len(text)] != text:
                break
            place += len(text)
        else:
            if place == len(data) and value.pop("digest", None):
                return value
    raise ValueError(f"{name} is damaged: its digest does not match its content")


def sealed(value: dict[str, Any]) -> bytes:
    """The JSON text of an object, with a digest of it under ``digest``."""
    return b"".join(sealed_texts(seal(value)))


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself under ``digest``, however it is then laid out."""
    return {**value, "digest": fingerprint(value)}


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Every setting in which two JSON-plain values differ, as ``teacher.revision: 'a' -> 'b'``.

    `name`: what the two are called; the names of settings begin with it.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r} -> {new!r}"
