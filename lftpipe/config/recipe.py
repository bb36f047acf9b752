"""Settings from TOML recipes and from what was given by name. No torch here."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lftpipe.base.errors import SettingsError
from lftpipe.config.refusal import refusal
from lftpipe.config.settings import Common

S = TypeVar("S", bound=Common)

RECIPE_TABLES = ("compress", "extract", "recouple", "plan", "train", "heal", "evaluate", "sweep", "toy")

#: What the settings.toml of a run records beside its settings; a recipe may hold it.
RECORD_TABLE = "store"

#: Longest recipe in bytes, and most dots in one of its lines: a key of n dotted parts costs n² in Python's
#: parser, gigabytes for 50,000.
_LONGEST_RECIPE, _MOST_DOTS = 2**20, 200


def from_recipe(kind: type[S], path: Path | None, table: str, given: dict[str, Any]) -> S:
    """Settings from a TOML recipe's `[table]`, overridden by what was `given` by name.

    `given`: values by field; None is not given.
    Raises `SettingsError` if the recipe is no TOML or holds a key that is no setting of this stage, or a
    value is out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        where = f"[{table}] of {path}"
        values = read_recipe(path).get(table, {})
        _check(kind, values, where)
        for name, variant in values.get("variants", {}).items():
            _check(kind, variant, f"[{table}.variants.{name}] of {path}")
    return kind(**{**values, **{key: value for key, value in given.items() if value is not None}})


def _check(kind: type[Common], values: Any, where: str) -> None:
    """Refuse a table that makes no settings, naming the table."""
    if not isinstance(values, dict):
        raise SettingsError(where, "a table of settings", "correct the recipe")
    try:
        kind(**values)
    except SettingsError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        names = [field.name for field in dataclasses.fields(kind)]
        raise refusal(error.__cause__, names, where) from error


def read_recipe(path: Path) -> dict[str, Any]:
    """The tables of a recipe.

    `path`: a TOML file; the `settings.toml` of a run is one too.
    Raises `SettingsError` if it cannot be read, is no TOML, is empty, or has a table that belongs to no
    command.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_RECIPE + 1)
        if len(text) > _LONGEST_RECIPE or any(line.count(b".") > _MOST_DOTS for line in text.splitlines()):
            raise SettingsError(
                f"recipe {path}",
                f"at most {_LONGEST_RECIPE:,} bytes, and {_MOST_DOTS} dots in a line",
                "shorten it",
            )
        recipe = tomllib.loads(text.decode())
    except OSError as error:
        raise SettingsError(
            f"recipe {path}", "a readable TOML file", f"check the path ({error.strerror})"
        ) from error
    except RecursionError as error:
        raise SettingsError(f"recipe {path}", "tables and lists of a few levels", "flatten it") from error
    except ValueError as error:  # no UTF-8, no TOML, a number of thousands of digits
        raise SettingsError(f"recipe {path}", "TOML", f"correct it ({error})") from error
    recipe.pop(RECORD_TABLE, None)
    if not recipe:
        raise SettingsError(f"empty recipe {path}", f"tables {', '.join(RECIPE_TABLES)}", "add one")
    for table, content in recipe.items():
        if table not in RECIPE_TABLES or not isinstance(content, dict):
            raise SettingsError(
                f"[{table}] in {path}", f"tables {', '.join(RECIPE_TABLES)}", "correct or remove the table"
            )
    return recipe
