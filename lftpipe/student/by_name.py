"""Any language model that a user names: a run's student, an exported folder, or a teacher."""

from pathlib import Path
from typing import Any, NamedTuple

from lftpipe import runs
from lftpipe.base.errors import RunError
from lftpipe.base.workspace import find_run
from lftpipe.student.assemble import build_student, without_layers
from lftpipe.student.loading import load_model, load_teacher, teacher_of_run
from lftpipe.teacher.source import load_tokenizer, open_teacher, tokenizer_of


class LanguageModel(NamedTuple):
    """A model in float32, its tokenizer, and how it is called."""

    name: str
    model: Any
    tokenizer: Any


def language_model(name: str, workspace: Path, store: Path | None = None) -> LanguageModel:
    """A model by name.

    Raises
    ------
    LftpipeError
        If there is no run, folder or teacher of the name, or it is damaged.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return LanguageModel(name, load_model(folder), tokenizer_of(folder, RunError, "export it again"))
    if _is_run(name, workspace, store):
        run = runs.open_run(find_run(workspace, store, name))
        teacher = teacher_of_run(run, workspace)
        return LanguageModel(name, build_student(teacher, [run]), load_tokenizer(teacher))
    teacher = open_teacher(name, workspace)
    return LanguageModel(name, load_teacher(teacher), load_tokenizer(teacher))


def beside(name: str, workspace: Path, store: Path | None = None) -> list[LanguageModel]:
    """For a run: its teacher, and the teacher without the layers of its blocks; for another model nothing."""
    if not _is_run(name, workspace, store):
        return []
    run = runs.open_run(find_run(workspace, store, name))
    teacher = teacher_of_run(run, workspace)
    model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
    skipping = without_layers(model, teacher, run.shortened)
    return [LanguageModel(teacher.name, model, tokenizer), LanguageModel("skip", skipping, tokenizer)]


def _is_run(name: str, workspace: Path, store: Path | None) -> bool:
    try:
        return (find_run(workspace, store, name) / runs.MANIFEST).is_file()
    except RunError:
        return False
