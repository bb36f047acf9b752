"""From pydantic's report to the one line that lftpipe prints: given, expected, do. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ArgsKwargs

from lftpipe.errors import SettingsError

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
    "less_than_equal": ("le", "at most", "lower"),
    "less_than": ("lt", "less than", "lower"),
}


def refusal(error: ValidationError, names: Sequence[str], where: str | None = None) -> SettingsError:
    """The first thing that pydantic found wrong, as an error of lftpipe.

    Parameters
    ----------
    where
        The table of a recipe that holds the value; left out, the value is shown as an option.
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
