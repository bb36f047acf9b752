"""What all artefacts have in common: a digest of themselves, and a reader that refuses anything else."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from lftpipe.base.errors import LftpipeError, RunError
from lftpipe.base.files import read_json, seal, write_atomic

Kind = TypeVar("Kind", bound="Artefact")
Value = TypeVar("Value")

#: How pydantic reads an artefact: types as they are, and unknown keys of newer versions left out.
READ_STRICTLY: dict[str, Any] = {
    "strict": True,
    "extra": "ignore",
    "allow_inf_nan": False,
    "ser_json_inf_nan": "constants",  # which `Artefact.text` refuses
}

#: A field that is left out of the object where it is None.
OrAbsent = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]


@functools.cache
def adapter(kind: type[Any]) -> Any:  # a TypeAdapter, which beartype cannot check
    """What reads and writes a type as JSON."""
    return TypeAdapter(kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonObject:
    """Fields that are the keys of a JSON object."""

    __pydantic_config__: ClassVar[dict[str, Any]] = READ_STRICTLY

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, in the order of the fields."""
        return adapter(type(self)).dump_python(self, mode="json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact(JsonObject):
    """A JSON object that is written to be read again."""

    NAME: ClassVar[str] = "an artefact"
    """What it is called in errors."""
    CURE: ClassVar[str] = "make it again"
    """What to do if it is damaged."""
    ERROR: ClassVar[type[LftpipeError]] = RunError
    """What is raised if it is damaged."""

    @classmethod
    def from_json(cls: type[Kind], path: Path) -> Kind:
        """Read and validate a file.

        Raises `LftpipeError` if it was damaged or changed, in one line with the reason.
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

        Raises `ValueError` if a type is wrong or a law is broken, with the reason.
        """
        found = adapter(cls).validate_json(json.dumps(value), strict=True)
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
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200] or type(error).__name__


def require(holds: bool, what: str) -> None:
    """Raise ValueError if a law does not hold."""
    if not holds:
        raise ValueError(what)
