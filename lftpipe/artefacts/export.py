"""`lftpipe.json` of an exported folder: from what it was made, and what lftpipe put there."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from lftpipe.artefacts.base import Artefact, require
from lftpipe.artefacts.run import RecordedTeacher

#: The file's name.
SOURCE = "lftpipe.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSource(Artefact):
    """Runs and teacher of a student that was exported."""

    NAME: ClassVar[str] = f"the {SOURCE} of an exported folder"
    CURE: ClassVar[str] = "export it again"
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"files"})

    form: str
    blocks: list[str]
    runs: list[str]
    k: int
    solver: str
    teacher: RecordedTeacher
    lftpipe: str
    files: list[str] | None = None
    """Names of all files of the folder; older exports do not say."""

    def check(self) -> None:
        """There is a block and a run for each, and steps to take."""
        require(len(self.blocks) == len(self.runs) >= 1, "blocks and runs disagree")
        require(self.k >= 1, "k is not positive")

    @classmethod
    def of_folder(cls, folder: Path) -> "ExportSource":
        """Read that of a folder."""
        return cls.from_json(folder / SOURCE)
