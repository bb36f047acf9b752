"""Layers and blocks as they are written: `all`, `6,18`, `0:13`, and `6:12`. No torch."""

import re
from collections.abc import Sequence

from lftpipe.base.errors import SettingsError


def parse_layers(text: str, num_states: int) -> tuple[int, ...]:
    """`all`, `6,18` or `0:13` to sorted state indices below `num_states`.

    Raises `SettingsError` if the text is of another form, the range is empty, or an index is out of range.
    """
    if text == "all":
        return tuple(range(num_states))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        start, stop = int(match[1]), int(match[2])
        if start >= stop:
            right = f"{stop}:{start}" if start > stop else f"{start}:{start + 1}"
            raise SettingsError(f"layers {text}", "a half-open range m:n with m < n", f"try {right}")
        chosen = range(start, stop)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        chosen = sorted({int(part) for part in text.split(",")})
    else:
        raise SettingsError(f"layers {text!r}", "all, a list 6,18 or a range 0:13", "use that format")
    if chosen[-1] >= num_states:
        raise SettingsError(
            f"layers {text}",
            f"states from 0 to {num_states - 1}",
            f"name states below {num_states}",
        )
    return tuple(chosen)


def parse_block(text: str, num_layers: int) -> tuple[int, int]:
    """`m:n` to the half-open block of layers it replaces.

    Raises `SettingsError` if it is of another form, empty, or reaches past the last layer.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise SettingsError(f"block {text!r}", "m:n, as in 6:12", "use that format, or auto")
    m, n = int(match[1]), int(match[2])
    if m >= n:
        raise SettingsError(
            f"block {text}", "m:n with m < n", f"try {n}:{m}" if n != m else f"try {m}:{m + 1}"
        )
    if n > num_layers:
        raise SettingsError(
            f"block {text}", f"n at most {num_layers}, the teacher's layers", "choose a block inside them"
        )
    return m, n


def check_apart(blocks: Sequence[tuple[int, int]], given: str, num_layers: int | None = None) -> None:
    """Refuse blocks that one student cannot have together.

    `given`: what the user said, which the error shows before the blocks.
    `num_layers`: the teacher's, where blocks were not checked against them before.
    Raises `SettingsError` if blocks overlap, are empty, not in order, or reach past the last layer.
    """
    end = 0
    for m, n in blocks:
        if not end <= m < n or (num_layers is not None and n > num_layers):
            shown = ", ".join(f"{m}:{n}" for m, n in blocks)
            inside = "" if num_layers is None else f", inside {num_layers} layers"
            raise SettingsError(
                f"{given} {shown}",
                f"blocks in order that do not overlap{inside}",
                "choose others, as 6:12 and 12:18",
            )
        end = n
