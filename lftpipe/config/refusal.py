"""How a setting's value is checked, and how a wrong one is refused in one line."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ArgsKwargs, PydanticCustomError

from lftpipe.base.errors import SettingsError

# --- What a text, a path and a temperature must be, whatever option they are given for. No torch.

#: Of a name in a folder, and of a whole path, in bytes of UTF-8 (Linux and macOS).
_LONGEST_NAME, _LONGEST_PATH = 255, 4000

#: Longest text of an option that is no prompt.
_LONGEST_TEXT = 100_000

_LOWEST_TEMPERATURE = 1e-3


def refused(expected: str, do: str) -> PydanticCustomError:
    """A validator's error that `lftpipe.config.refusal` turns into one line."""
    return PydanticCustomError("lftpipe", "{expected}; {do}", {"expected": expected, "do": do})


def as_tuple_of_numbers(value: Any) -> Any:
    """A single number as a list of one."""
    return (value,) if isinstance(value, int | float) else value


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


# --- From pydantic's report to the one line that lftpipe prints: given, expected, do. No torch.

#: Characters of a value that a message shows.
_SHOWN = 80

#: Fields that stand behind a command without an option.
_POSITIONAL = ("target", "runs")

#: pydantic's kinds of error: what was expected.
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_unicode": "a text in UTF-8",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a table",
    "finite_number": "a finite number",
}

#: Of bounds: the error's context, what was expected, what to do.
_BOUNDS = {
    "greater_than_equal": ("ge", "at least", "raise"),
    "greater_than": ("gt", "more than", "raise"),
    "less_than_equal": ("le", "at most", "lower"),
    "less_than": ("lt", "less than", "lower"),
}


def refusal(error: ValidationError, names: Sequence[str], where: str | None = None) -> SettingsError:
    """The first thing that pydantic found wrong, as an error of lftpipe.

    `where`: the table of a recipe that holds the value; left out, the value is shown as an option.
    """
    found = error.errors(include_url=False)[0]
    name = str(found["loc"][0]) if found["loc"] else "settings"
    if found["type"] == "unexpected_keyword_argument":
        return SettingsError(
            f"{_short(repr(name))} in {where or 'the settings'}",
            f"one of {', '.join(sorted(names))}",
            "correct or remove the key",
        )
    expected, do = _expected(found, name)
    return SettingsError(_given(found, name, where), expected, do)


def _expected(found: Mapping[str, Any], name: str) -> tuple[str, str]:
    kind, context = found["type"], found.get("ctx", {})
    if kind in _BOUNDS:
        key, words, verb = _BOUNDS[kind]
        bound = context[key]
        return f"{words} {bound:{'d' if isinstance(bound, int) else 'g'}}", f"{verb} {as_option(name)}"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {choices}", "choose one"
    if kind == "lftpipe":
        return context["expected"], context["do"]
    if kind == "string_pattern_mismatch":
        return "cpu, cuda, cuda:N or mps", "name one of these"
    return _KINDS.get(kind) or str(found["msg"]), "correct it"


def _given(found: Mapping[str, Any], name: str, where: str | None) -> str:
    value = found["input"]
    if isinstance(value, ArgsKwargs):  # the error is not one field's
        return where or "the settings"
    if where is None:
        shown = _short(str(value) if isinstance(value, str | PurePath) else _text(value))
        return shown if name in _POSITIONAL else f"{as_option(name)} {shown}"
    return f"{name} = {_short(_text(value))} in {where}"


def as_option(name: str) -> str:
    """A field's name as it is typed: `learning_rate` to `--learning-rate`."""
    return "--" + name.replace("_", "-")


def _text(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
