"""Settings from strict TOML recipes and options, checked. No torch here."""

import dataclasses
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from lftpipe.config.settings import Common
from lftpipe.errors import SettingsError

S = TypeVar("S", bound=Common)

RECIPE_TABLES = ("extract", "recouple", "train", "evaluate", "sweep", "toy")

#: What the settings.toml of a run records beside its settings; a recipe may hold it.
RECORD_TABLE = "store"

#: Lowest values of the numeric settings whose lowest is not 1.
_LEAST: dict[str, float] = {
    "seed": 0,
    "context": 2,
    "validation_tokens": 0,
    "logits": 0,
    "alpha": 0,
    "replace": 0,
    "warmup": 0,
    "weight_decay": 0,
    "learning_rate": 0,
    "clip": 0,
    "temperature": 0,
    "ema": 0,
    "hold_back": 0,
    "evaluate_every": 0,
    "patience": 0,
    "adaptive": 0,
}


def check(settings: Common) -> None:
    """Refuse numbers outside their range.

    Raises
    ------
    SettingsError
        Naming the setting and its bound.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        option = f"--{field.name.replace('_', '-')} {shown}"
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            least = _LEAST.get(field.name, 1)
            if not math.isfinite(number):
                raise SettingsError(option, "a finite number", "choose one")
            if number < least:
                raise SettingsError(option, f"at least {least}", f"raise --{field.name.replace('_', '-')}")
            if field.name in ("replace", "warmup", "ema", "hold_back") and number > 1:
                raise SettingsError(option, "a share of at most 1", f"lower --{field.name}")


def from_recipe(kind: type[S], path: Path | None, table: str, given: dict[str, Any]) -> S:
    """Settings from a TOML recipe's `[table]`, overridden by what was `given` by name.

    Raises
    ------
    SettingsError
        If the recipe is no TOML, or holds a key that is no setting of this stage.
    """
    table_values = _read_recipe(path).get(table, {}) if path is not None else {}
    merged = _checked(kind, table_values, f"[{table}] of {path}")
    variants = merged.get("variants", {})
    for name, values in variants.items():
        variants[name] = _checked(kind, values, f"[{table}.variants.{name}] of {path}")
    merged |= {key: value for key, value in given.items() if value is not None}
    settings = kind(**merged)
    check(settings)
    return settings


def _checked(kind: type[Common], values: Any, where: str) -> dict[str, Any]:
    """A table's values, each of its setting's type."""
    if not isinstance(values, dict):
        raise SettingsError(where, "a table of settings", "correct the recipe")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for key in values:
        if key not in names:
            raise SettingsError(
                f"{key!r} in {where}", f"one of {', '.join(sorted(names))}", "correct or remove the key"
            )
    return {key: _convert(value, hints[key], key) for key, value in values.items()}


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(
            f"recipe {path}", "a readable TOML file", f"check the path ({error.strerror})"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"recipe {path}", "TOML", f"mend it ({error})") from error
    recipe.pop(RECORD_TABLE, None)
    for table, content in recipe.items():
        if table not in RECIPE_TABLES or not isinstance(content, dict):
            raise SettingsError(
                f"[{table}] in {path}", f"tables {', '.join(RECIPE_TABLES)}", "correct or remove the table"
            )
    return recipe


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, optional or not; none of another type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal), ())


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A TOML value to a field's type."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise SettingsError(f"{key} = {value!r} in the recipe", "a list", "write it in brackets")
        return tuple(_convert(item, typing.get_args(hint)[0], key) for item in value)
    if choices := _choices(hint):
        if value not in choices:
            raise SettingsError(
                f"{key} = {value!r} in the recipe", f"one of {', '.join(choices)}", "choose one"
            )
        return value
    if typing.get_origin(hint) is dict:
        return dict(value) if isinstance(value, dict) else _convert(value, dict, key)
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not types.NoneType]
    for kind in kinds:
        accepted = {Path: str, float: int | float}.get(kind, kind)
        if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
            return kind(value)
    raise SettingsError(
        f"{key} = {value!r} in the recipe",
        " or ".join(_TOML_NAMES[kind] for kind in kinds),
        "correct the recipe",
    )


_TOML_NAMES = {
    str: "a text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}
