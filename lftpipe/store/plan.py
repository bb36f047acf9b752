"""What is to be computed, frozen in a file: every process of an extraction reads it there."""

from pathlib import Path
from typing import Any

from lftpipe.files import read_sealed, write_sealed
from lftpipe.store.layout import PLAN


def read_plan(path: Path) -> dict[str, Any] | None:
    """What is to be computed, as `write_plan` froze it; None if nothing is, or if it is damaged."""
    try:
        return read_sealed(path / PLAN)
    except (FileNotFoundError, ValueError):
        return None


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Freeze what is to be computed."""
    write_sealed(path / PLAN, plan)
