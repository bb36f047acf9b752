"""Runs whose flow layers are one student's: found by the name of any of them, and kept together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lftpipe.errors import RunError
from lftpipe.runs.finished import Run, open_run
from lftpipe.runs.folder import MANIFEST, SETTINGS


def open_student(path: Path) -> list[Run]:
    """A run and those that were trained with it as one student, in the order of their blocks.

    One whose others are gone, or that has another name now, is a student by itself.

    Raises
    ------
    RunError
        If one is damaged or unfinished, or healing fitted a run to others that are not there.
    """
    run = open_run(path)
    names = run.joint or []
    if path.name not in names and path.resolve().name in names:  # `.`, or a link
        run = replace(run, path=path.resolve())
    found = [run]
    if run.path.name in names:
        folders = [run.path.parent / name for name in names]
        for folder in folders:
            if (folder / SETTINGS).is_file() and not (folder / MANIFEST).is_file():
                open_run(folder)  # says that it is unfinished
        if all((folder / MANIFEST).is_file() for folder in folders):
            others = [run if folder == run.path else open_run(folder) for folder in folders]
            if all(each.joint == run.joint and each.student == run.student for each in others):
                found = others
    refuse_parts(found)
    return sorted(found, key=lambda each: each.block)


def refuse_parts(opened: Sequence[Run]) -> None:
    """Refuse to put a healed run into a student that it was not healed in."""
    names = [run.path.name for run in opened]
    for run in opened:
        fitting = run.joint or [run.path.name]
        whole = sorted(names) == sorted(fitting) and all(each.student == run.student for each in opened)
        if run.healed is None or whole:
            continue
        if len(fitting) == 1:
            raise RunError(
                "a healed run beside others", "a healed run alone: its layers fit no other", "name it alone"
            )
        raise RunError(
            f"{run.path}, one of {len(fitting)} flow layers that were healed as one student",
            f"all of them, side by side and by their names: {', '.join(fitting)}",
            "bring back what is missing, or heal again",
        )


def open_students(paths: Iterable[Path]) -> list[list[Run]]:
    """The students of several runs, each once, in the order in which they are named."""
    found: dict[tuple[Path, ...], list[Run]] = {}
    for path in paths:
        student = open_student(path)
        found.setdefault(tuple(run.path.resolve() for run in student), student)
    return list(found.values())
