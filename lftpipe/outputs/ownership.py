"""What in a folder is lftpipe's: its marks, and the refusal of anything else."""

import os
from collections.abc import Sequence
from pathlib import Path

from lftpipe.errors import RunError, SettingsError

#: What every page and picture carries that lftpipe makes.
MARK = b"made by lftpipe"

#: A comment for pages in Markdown and HTML.
COMMENT = f"<!-- {MARK.decode()} -->"

_LOOK_BYTES = 2**22


def refuse_foreign_files(folder: Path, known: set[str], what: str) -> None:
    """Refuse to replace a folder with a file in it that is not among those `known`."""
    for entry in sorted(folder.iterdir()):
        if entry.name not in known:
            raise RunError(f"{entry}, which is not part of {what}", what, "move it, or name another --out")


def refuse_name(name: str, option: str) -> None:
    """Refuse a name of a file or folder that would lead to another folder, or be hidden.

    Raises
    ------
    SettingsError
        If it is empty, begins with a dot, or has a separator or a control character in it.
    """
    if not name or name.startswith(".") or "/" in name or os.sep in name or not name.isprintable():
        raise SettingsError(
            f"{option} {name!r}", "a plain name, without / and not beginning with a dot", "choose another"
        )


def has_mark(path: Path, marks: Sequence[bytes]) -> bool:
    """Whether a file is known by any of some texts; an empty one is, since nothing is lost with it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        data = file.read(_LOOK_BYTES)
    return not data or any(mark in data for mark in marks)


def not_ours(path: Path) -> SettingsError:
    """The error of a file that stands where lftpipe is to write."""
    return SettingsError(
        f"{path}, which lftpipe did not make",
        "a new file, or one to replace",
        "move it, or name another --out",
    )
