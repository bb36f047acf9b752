"""Damage and edits of files, each a function of a seed."""

import copy
import json
import random
from typing import Any

#: Bytes that end texts, open structures, or are large lengths.
WORDS = [
    b"\x00",
    b"\xff" * 8,
    b"\n",
    b'"',
    b"{" * 60,
    b"]",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 400,
    b"../../x",
    b"\x80",
]

#: Values that a reader may not expect.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**40,
    "",
    "x" * 300,
    "../../x",
    [],
    {},
    [[]],
    [None] * 5,
    "NaN",
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, moved, or overwritten."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            return rng.choice(WORDS)
        place, length = rng.randrange(len(data)), rng.choice((1, 4, 64, 1024))
        action = rng.randrange(6)
        if action == 0:
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        elif action == 1:
            data = data[:place]
        elif action == 2:
            data = data[:place] + data[place + length :]
        elif action == 3:
            data = data[:place] + data[place : place + length] + data[place:]
        elif action == 4:
            data = data[:place] + rng.choice(WORDS) + data[place:]
        else:
            other = rng.randrange(len(data))
            data = data[:place] + data[other : other + length] + data[place + length :]
    return data


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced, removed, or doubled."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        action = rng.randrange(4)
        if action == 0:
            del place[key]
        elif action == 1 and isinstance(place, list):
            place.append(place[key])
        elif action == 1 and isinstance(place, dict):
            place[str(rng.choice(list(place))) + rng.choice(["", "x"])] = place[key]
        else:
            place[key] = rng.choice(VALUES)
        break
    return value


def edited_json(data: bytes, rng: random.Random, *, digest: str = "drop") -> bytes:
    """A JSON file with an edited value; its digest is dropped, or made to fit (`seal`)."""
    from lftpipe.base.files import seal

    value = {key: entry for key, entry in json.loads(data).items() if key != "digest"}
    value = edited(value, rng)
    try:
        return json.dumps(seal(value) if digest == "seal" else value, indent=1).encode()
    except (ValueError, TypeError):
        return json.dumps(value).encode()
