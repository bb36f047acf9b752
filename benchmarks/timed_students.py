"""The models that student_speed.py times: the teacher, and its student in each number of steps and form."""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lftpipe import runs
from lftpipe.base.errors import RunError
from lftpipe.base.workspace import find_run
from lftpipe.flow.solver import EVALUATIONS
from lftpipe.student.assemble import build_student, load_model, teacher_of_folder, teacher_of_run
from lftpipe.student.model import LatentFlow
from lftpipe.student.plain import unroll


@dataclass(frozen=True)
class Entry:
    """A model to be timed, and how to bring it into the form that is timed."""

    name: str
    model: Any
    steps: int | None = None
    solver: str | None = None

    def ready(self) -> Any:
        """The model, set to this entry's steps."""
        if self.steps is not None:
            self.model.set_steps(self.steps, self.solver)
        return self.model

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the JSON output."""
        nfe = EVALUATIONS[self.solver] * self.steps if self.steps and self.solver else None
        return {"model": self.name, "k": self.steps, "solver": self.solver, "nfe": nfe}


def bytes_on_disk(model: Any) -> int:
    """Size of the weights as safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def open_student(options: argparse.Namespace) -> tuple[Any, Any, list[tuple[int, int]]]:
    """The student, its teacher, and the blocks it replaces."""
    folder = Path(options.run)
    if (folder / "config.json").is_file():
        teacher, student = teacher_of_folder(folder, options.workspace), load_model(folder)
        if options.solver and not isinstance(student, LatentFlow):
            raise RunError(f"--solver for {folder}, a plain export", "a student with steps", "leave it out")
        if options.solver:
            student.set_steps(1, options.solver)
        recorded = json.loads((folder / "lftpipe.json").read_text())["blocks"]
        return student, teacher, [(int(m), int(n)) for m, n in (block.split(":") for block in recorded)]
    opened = [runs.open_run(find_run(options.workspace, None, options.run))]
    teacher = teacher_of_run(opened[0], options.workspace)
    return build_student(teacher, opened, solver=options.solver), teacher, [run.block for run in opened]


def entries_of(student: Any, teacher_model: Any, options: argparse.Namespace) -> list[Entry]:
    """The teacher, and the student in each number of steps and form."""
    found = [Entry("teacher", teacher_model)]
    if not isinstance(student, LatentFlow):
        return [*found, Entry("plain export", student)]
    solver = student.config.solver
    timed = any(block.kind == "flow" for block in student.config.flow_blocks)
    counts = options.k if timed else (1,)
    found += [Entry("student", student, k, solver) for k in counts]
    for k in counts if options.plain else ():
        student.set_steps(k)
        try:
            found.append(Entry(f"plain form, k = {k}", unroll(student)))
        except RunError as error:
            print(f"no plain form: {error}")
            break
    return found


def label(entry: Entry) -> str:
    """The entry's name in a table."""
    return entry.name if entry.steps is None else f"{entry.name}, k = {entry.steps}"
