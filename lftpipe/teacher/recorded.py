"""A teacher that a store, a run or an export has recorded, found again and proved to be the same."""

from pathlib import Path
from typing import Any

from lftpipe.errors import TeacherError
from lftpipe.teacher.source import Teacher, open_teacher

#: Files of a teacher whose digests are recorded. With other rotary settings, or other token ids, the same
#: weights are another model.
PARTS = ("weights", "config", "tokenizer")


def record_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What a store's identity records of its teacher, with the tokenizer's digest that stands beside it.

    Parameters
    ----------
    identity
        Of a store.
    """
    known = {"tokenizer_digest": identity["tokenizer_digest"]} if "tokenizer_digest" in identity else {}
    return identity["teacher"] | known


def open_recorded(recorded: dict[str, Any], workspace: Path, made: Path) -> Teacher:
    """The teacher that something was made with.

    Parameters
    ----------
    recorded
        `Teacher.identity()` as it was then, and the tokenizer's digest if that was recorded too.
    workspace
        Where converted teachers lie.
    made
        What was made with it, for the error.

    Raises
    ------
    TeacherError
        If it is not found, or any part of it is no longer as it was.
    """
    teacher = open_teacher(recorded["model"], workspace, revision=recorded["revision"])
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
