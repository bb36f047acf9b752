"""A teacher that a store, a run or an export has recorded, found again and proved to be the same."""

from pathlib import Path
from typing import Any

from lftpipe.errors import TeacherError
from lftpipe.teacher.source import Teacher, open_teacher

#: Files of a teacher whose digests are recorded. With other rotary settings, or other token ids, the same
#: weights are another model.
PARTS = ("weights", "config", "tokenizer")


def record_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What a store's identity records of its teacher, with the tokenizer's digest that stands beside it."""
    known = {"tokenizer_digest": identity["tokenizer_digest"]} if "tokenizer_digest" in identity else {}
    return identity["teacher"] | known


def open_recorded(recorded: dict[str, Any], workspace: Path, made: Path) -> Teacher:
    """The teacher that something was made with.

    Parameters
    ----------
    recorded
        `Teacher.identity()` as it was then, and the tokenizer's digest if that was recorded too.
    made
        What was made with it, for the error, and to find a folder that was moved together with it.

    Raises
    ------
    TeacherError
        If it is not found, or any part of it is no longer as it was.
    """
    teacher = open_teacher(_place(recorded["model"], made), workspace, revision=recorded["revision"])
    now = {
        "weights": lambda: teacher.checkpoint.digest,
        "config": lambda: teacher.config_digest,
        "tokenizer": lambda: teacher.tokenizer_digest,
    }
    for part in PARTS:
        before = recorded.get(f"{part}_digest")  # older stores and runs recorded fewer
        if before is not None and now[part]() != before:
            raise TeacherError(
                f"teacher {recorded['model']} whose {part} changed since {made} was made",
                f"{part} with digest {before[:12]}…",
                f"put the old {part} back, or make it again from the start (extract --force, train --force)",
            )
    return teacher


def _place(model: str, made: Path) -> str:
    """Where a local teacher is now: as recorded, or, if that moved, as it lay to what was made with it."""
    old = Path(model)
    if not old.is_absolute() or old.exists():
        return model
    for above in made.resolve().parents:
        for count in range(1, len(old.parts)):
            new = above.joinpath(*old.parts[-count:])
            if (new / "config.json").is_file() or (new.suffix == ".gguf" and new.is_file()):
                return str(new)
    raise TeacherError(
        f"teacher {model} of {made}, which is not there",
        "the folder or file that it was made with",
        f"put it back, or move it along, such as to {made.resolve().parent / old.name}",
    )
