"""What a text, a path and a temperature must be, whatever option they are given for. No torch."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

#: Of a name in a folder, and of a whole path, in bytes of UTF-8 (Linux and macOS).
_LONGEST_NAME, _LONGEST_PATH = 255, 4000

#: Longest text of an option that is no prompt.
_LONGEST_TEXT = 100_000

_LOWEST_TEMPERATURE = 1e-3


def refused(expected: str, do: str) -> PydanticCustomError:
    """A validator's error that `lftpipe.config.refusal` turns into one line."""
    return PydanticCustomError("lftpipe", "{expected}; {do}", {"expected": expected, "do": do})


def check_text(text: str) -> str:
    """Refuse characters that no terminal and no file name shows."""
    if not _on_one_line(text) or len(text) > _LONGEST_TEXT:
        raise refused("one line of text, without control characters", "correct it")
    return text


def _on_one_line(text: str) -> bool:
    """Whether a terminal and UTF-8 can show it: no controls, lone surrogates or line separators."""
    return all(unicodedata.category(each) not in ("Cc", "Cs", "Zl", "Zp") for each in text)


def check_unicode(text: str) -> str:
    """Refuse bytes that are no UTF-8, which Python keeps as lone surrogates."""
    if any(unicodedata.category(each) == "Cs" for each in text):
        raise refused("a text in UTF-8", "correct it")
    return text


def check_path(path: Path) -> Path:
    """Refuse what no file system can hold, or what could not be printed on one line."""
    text = str(path)
    if not _on_one_line(text):
        raise refused("a path in UTF-8 without control characters", "rename that file or folder")
    parts = [len(part.encode()) for part in path.parts]
    if len(text.encode()) > _LONGEST_PATH or max(parts, default=0) > _LONGEST_NAME:
        raise refused(f"names of at most {_LONGEST_NAME} bytes", "choose a shorter path")
    return path


def check_temperature(temperature: float) -> float:
    """Refuse a temperature that would divide logits beyond every float."""
    if 0 < temperature < _LOWEST_TEMPERATURE:
        raise refused(f"0, or at least {_LOWEST_TEMPERATURE:g}", "pass 0 for the most likely token")
    return temperature


def check_names(tables: dict[str, Any]) -> dict[str, Any]:
    """Refuse names of a recipe's variants that cannot be part of a folder's name."""
    for name in tables:
        if not re.fullmatch(r"[\w.+-]{1,100}", name) or set(name) <= {"."}:
            raise refused("names of letters, digits and -_.+", f"rename {name[:40]!r}")
    return tables
