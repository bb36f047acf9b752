"""Runs whose flow layers are one student's: found by the name of any of them, and kept together."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lftpipe.errors import RunError
from lftpipe.runs.finished import Run, open_run
from lftpipe.runs.folder import MANIFEST


def open_student(path: Path) -> list[Run]:
    """A run and those that were trained with it as one student, in the order of their blocks.

    One whose others are gone, or that has another name now, is a student by itself.

    Parameters
    ----------
    path
        The folder of any of them.

    Raises
    ------
    RunError
        If one is damaged, or healing fitted a run to others that are not there.
    """
    run = open_run(path)
    folders = [path.parent / name for name in run.joint or ()]
    found = [run]
    if path.name in (run.joint or ()) and all((folder / MANIFEST).is_file() for folder in folders):
        found = [run if folder.name == path.name else open_run(folder) for folder in folders]
        if any(each.joint != run.joint for each in found):
            found = [run]
    refuse_parts(found)
    return sorted(found, key=lambda each: each.block)


def refuse_parts(opened: Sequence[Run]) -> None:
    """Refuse to put a healed run into a student that it was not healed in.

    Parameters
    ----------
    opened
        All runs of the student.

    Raises
    ------
    RunError
        Naming those that it fits.
    """
    names = {run.path.name for run in opened}
    for run in opened:
        fitting = set(run.joint or [run.path.name])
        if run.healed is None or names == fitting:
            continue
        if len(fitting) == 1:
            raise RunError(
                "a healed run beside others", "a healed run alone: its layers fit no other", "name it alone"
            )
        raise RunError(
            f"{run.path} in a student of {', '.join(sorted(names))}",
            f"the runs that were healed as one student: {', '.join(run.joint or ())}",
            "name these, side by side in one folder",
        )


def open_students(paths: Iterable[Path]) -> list[list[Run]]:
    """The students of several runs, each once, in the order in which they are named.

    Parameters
    ----------
    paths
        Folders of runs.

    Raises
    ------
    RunError
        As `open_student`.
    """
    found: dict[tuple[Path, ...], list[Run]] = {}
    for path in paths:
        student = open_student(path)
        found.setdefault(tuple(run.path for run in student), student)
    return list(found.values())
