"""What all artefacts have in common: a digest of themselves, and a reader that refuses anything else.

A file without a digest is one of an older version: then its types and laws alone are checked.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from lftpipe.base.errors import LftpipeError, RunError
from lftpipe.base.files import seal, unseal, write_atomic

Kind = TypeVar("Kind", bound="Artefact")

#: Largest file that is read as JSON: the map of 81 states and 4096 tokens has 70 MB.
MOST_BYTES = 2**28

#: How pydantic reads an artefact: types as they are, and unknown keys of newer versions left out.
READ_STRICTLY: dict[str, Any] = {"strict": True, "extra": "ignore", "allow_inf_nan": False}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, whole: of bounded size and depth, without NaN, and true to its digest.

    Raises
    ------
    ValueError
        If it is no such object, with the reason.
    """
    return _parse(_read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return path.read_bytes()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return unseal(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonObject:
    """Fields that are the keys of a JSON object."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Fields that are left out of the object where they are None."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, in the order of the fields."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {
            name: _plain(value) for name, value in values if value is not None or name not in self.LEFT_OUT
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact(JsonObject):
    """A JSON object that is written to be read again."""

    NAME: ClassVar[str] = "an artefact"
    """What it is called in errors."""
    CURE: ClassVar[str] = "make it again"
    """What to do if it is damaged."""
    ERROR: ClassVar[type[LftpipeError]] = RunError
    """What is raised if it is damaged."""

    __pydantic_config__: ClassVar[dict[str, Any]] = READ_STRICTLY

    @classmethod
    def from_json(cls: type[Kind], path: Path) -> Kind:
        """Read and validate a file.

        Raises
        ------
        LftpipeError
            If it was damaged or changed, in one line with the reason.
        """
        try:
            return cls.from_plain(read_json(path))
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise cls.ERROR(
                f"{path}: {reason_of(error)}", f"{cls.NAME} as it was written", cls.CURE
            ) from None

    @classmethod
    def from_plain(cls: type[Kind], value: dict[str, Any]) -> Kind:
        """Validate a JSON object.

        Raises
        ------
        ValueError
            If a type is wrong or a law is broken, with the reason.
        """
        found = _reader(cls).validate_json(json.dumps(value), strict=True)
        found.check()
        return found

    def check(self) -> None:
        """Laws beyond the types; raises ValueError where one is broken."""

    def text(self, value: dict[str, Any]) -> str:
        """How the object is laid out in its file."""
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    def to_bytes(self) -> bytes:
        """The file's content: the object and its digest."""
        return self.text(seal(self.to_json())).encode()

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_atomic(path, self.to_bytes())


def reason_of(error: Exception) -> str:
    """Why something could not be read, in a few words on one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200] or type(error).__name__


@functools.cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _plain(value: Any) -> Any:
    """Objects within as such; everything else is JSON-plain as it is."""
    if isinstance(value, JsonObject):
        return value.to_json()
    if isinstance(value, list | tuple) and value and isinstance(value[0], JsonObject):
        return [each.to_json() for each in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def require(holds: bool, what: str) -> None:
    """Raise ValueError if a law does not hold."""
    if not holds:
        raise ValueError(what)
