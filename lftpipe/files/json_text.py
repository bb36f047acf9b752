"""JSON-plain values as text: one canonical form for digests, one with an indent for files.

Both come in parts, so that a manifest of a million files never lies in memory as a whole twice.
"""

import json
from collections.abc import Iterator
from typing import Any

#: Entries of an object that become text at once.
_TOGETHER = 4096

_quoted = json.encoder.encode_basestring


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8.

    Raises
    ------
    TypeError, ValueError
        If the value is not JSON-plain (NaN and infinities are not).
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
