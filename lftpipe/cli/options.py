"""The options of a command, from the fields of its settings, and their texts as values. No torch."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from lftpipe.base.errors import SettingsError
from lftpipe.config.settings import Common, Role

#: Options with two spellings.
SPELLINGS = {"from_teacher": "--from-teacher/--from-cache", "heard": "--from", "fused_with": "--with"}

#: The panel of fields that no panel of their class names, and that of what every command takes.
EXPERT, EVERY = "For experts", "Every command"

#: What every command takes beside its settings.
EXTRA = {
    "recipe": (
        None,
        Annotated[
            Path | None, typer.Option(help="TOML file with a table for this command.", rich_help_panel=EVERY)
        ],
    ),
    "json_output": (
        False,
        Annotated[
            bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=EVERY)
        ],
    ),
    "debug": (
        False,
        Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=EVERY)
        ],
    ),
}


def parameters(kind: type[Common]) -> list[inspect.Parameter]:
    """The parameters of a command, in the order of its help; each defaults to 'not given'."""
    hints = typing.get_type_hints(kind)
    found = [
        _parameter(name, None, _annotation(kind, name, hints[name], panel)) for name, panel in _ordered(kind)
    ]
    return found + [_parameter(name, default, annotation) for name, (default, annotation) in EXTRA.items()]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _ordered(kind: type[Common]) -> Iterator[tuple[str, str]]:
    """Fields and their panels: the arguments, then panel by panel, then what no panel names."""
    names = [f.name for f in dataclasses.fields(kind) if Role.RECIPE not in _field(kind, f.name).metadata]
    arguments = [name for name in names if Role.ARGUMENT in _field(kind, name).metadata]
    panels = {name: panel for panel, listed in kind.PANELS.items() for name in listed.split()}
    for name in [*arguments, *panels, *names]:
        if name in names:
            names.remove(name)
            yield name, panels.get(name, EXPERT)


def _field(kind: type[Common], name: str) -> FieldInfo:
    return kind.__pydantic_fields__[name]  # pyright: ignore[reportAttributeAccessIssue]


def _doc(kind: type[Common], name: str) -> str:
    """The docstring below a field, which stands in the class that declares it."""
    for base in kind.__mro__:
        fields = vars(base).get("__pydantic_fields__", {})
        if name in fields and fields[name].description:
            return " ".join(fields[name].description.split())
    return ""


def _annotation(kind: type[Common], name: str, hint: Any, panel: str) -> Any:
    """The typer annotation of one field."""
    field, doc = _field(kind, name), _doc(kind, name)
    default = field.get_default(call_default_factory=True)
    hint = _first(hint)
    many = typing.get_origin(hint) is tuple
    if Role.ARGUMENT in field.metadata:
        return Annotated[(list[str] if many else hint) | None, typer.Argument(help=doc, show_default=False)]
    if Role.REPEATED in field.metadata:
        hint = list[str]
    if many:
        hint, default = str, ",".join(map(str, default or ()))
    # Not in brackets: those are markup to rich, which would leave the default out.
    shown = f" (default: {default})" if default not in (None, "") and hint is not bool else ""
    names = [SPELLINGS[name]] if name in SPELLINGS else []
    option = typer.Option(
        *names,
        help=doc + shown,
        show_default=False,
        rich_help_panel=panel,
        metavar="<str>" if hint == list[str] else None,
    )
    return Annotated[hint | None, option]


def _first(hint: Any) -> Any:
    """Of the kinds that a field accepts the one in which it is written on the command line."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(hint) if each is not type(None))
    return hint


def parse(kind: type[Common], given: dict[str, Any]) -> dict[str, Any]:
    """What typer understood, as values of the settings' types, without what was not given."""
    hints = typing.get_type_hints(kind)
    values = {name: _parse(name, hints.get(name), value) for name, value in given.items()}
    return {name: value for name, value in values.items() if value not in (None, (), "")}


def _parse(name: str, hint: Any, value: Any) -> Any:
    """A list option's text to its tuple; an option given several times to one text."""
    hint = _first(hint)
    if isinstance(value, list):
        return tuple(value) if typing.get_origin(hint) is tuple else ",".join(value)
    if typing.get_origin(hint) is not tuple or not isinstance(value, str):
        return value
    number = typing.get_args(hint)[0]
    try:
        return tuple(number(part) for part in value.split(","))
    except ValueError as error:
        example = "1,2,3" if number is int else "0.02,0.05"
        raise SettingsError(
            f"--{name} {value}", f"numbers with commas between, as in {example}", "use that format"
        ) from error
