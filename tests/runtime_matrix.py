"""Which student runs where: family x solver x k x form x runtime, found by running it.

    python tests/runtime_matrix.py [--flash]      (after `make runtimes`, which prints it too)

Random flows in tiny random teachers (tests/tiny_students.py); every student is exported in both forms and
tried in every runtime. What works is compared with the student as it was built; what does not says why in
its own words. `--flash` lets llama.cpp use its flash attention.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from runtimes import (
    DOCUMENTS,
    bare_logits,
    byte_perplexities,
    llama_cpp_likelihoods,
    log_likelihood,
    usable_prompts,
)
from tiny_students import save_run, tokens

from lftpipe.base.errors import LftpipeError
from lftpipe.commands.export import export
from lftpipe.config.settings import ExportSettings
from lftpipe.student.assemble import build_student, load_model
from lftpipe.teacher.source import load_tokenizer, open_teacher

STEPS = (1, 2, 3)
#: Runtimes and what is compared there.
RUNTIMES = {
    "ours": "logits",
    "transformers": "logits",
    "lm_eval": "relative byte perplexity",
    "lm_eval + lftpipe": "relative byte perplexity",
    "llama.cpp": "log-likelihoods",
}
NEEDS = {"lm_eval": "lm_eval", "lm_eval + lftpipe": "lm_eval", "llama.cpp": "xllamacpp"}


@dataclass(frozen=True)
class Cell:
    """A student in a runtime: how far it is off, or why it does not run."""

    difference: float | None = None
    refusal: str | None = None
    installed: bool = True


@dataclass
class Row:
    """A student in one form."""

    family: str
    solver: Any
    k: int
    form: Any
    student: Any
    folder: Path
    cells: dict[str, Cell] = field(default_factory=dict)


def matrix(teachers: dict[str, Path], work: Path, *, flash: bool = False) -> list[Row]:
    """Try everything everywhere; `teachers` are folders by the name of their family."""
    rows = []
    for family, folder in teachers.items():
        teacher = open_teacher(str(folder), work)
        run = save_run(work / f"{family}-run", teacher, (1, 3), solver="euler")
        for solver in ("euler", "midpoint"):
            for k in STEPS:
                student = build_student(teacher, [run], steps=k, solver=solver)
                for form in ("plain", "latent-flow"):
                    out = work / f"{family}-{solver}-{k}-{form}"
                    rows.append(Row(family, solver, k, form, student, out))
                    _export(rows[-1], run.path, work)
    exported = [row for row in rows if row.folder.is_dir()]
    tokenizer = load_tokenizer(open_teacher(str(next(iter(teachers.values()))), work))
    for runtime, judge in _judges(tokenizer, work, flash).items():
        if find_spec(NEEDS.get(runtime, "torch")) is None:
            for row in rows:
                row.cells[runtime] = Cell(installed=False)
            continue
        for row, cell in zip(exported, judge(exported), strict=True):
            row.cells[runtime] = cell
    return rows


def _export(row: Row, run: Path, work: Path) -> None:
    """Write the student's folder, or note for every runtime why there is none."""
    settings = ExportSettings(
        workspace=work, runs=(str(run),), k=row.k, solver=row.solver, form=row.form, out=row.folder
    )
    try:
        export(settings)
    except LftpipeError as error:
        row.cells = dict.fromkeys(RUNTIMES, Cell(refusal=str(error)))


def _judges(tokenizer: Any, work: Path, flash: bool) -> dict[str, Callable[[list[Row]], list[Cell]]]:
    """For each runtime, from the exported students to what came of them there."""
    ids = tokens(24)

    @torch.inference_mode()
    def ours(rows: list[Row]) -> list[Cell]:
        pairs = [(load_model(row.folder)(ids).logits, row.student(ids).logits) for row in rows]
        return [Cell((one - other).abs().max().item()) for one, other in pairs]

    @torch.inference_mode()
    def transformers(rows: list[Row]) -> list[Cell]:
        answers = bare_logits(ids[0].tolist(), [row.folder for row in rows])
        return [
            Cell(refusal=answer)
            if isinstance(answer, str)
            else Cell((torch.tensor(answer) - row.student(ids).logits[0]).abs().max().item())
            for row, answer in zip(rows, answers, strict=True)
        ]

    def lm_eval(rows: list[Row], how: str) -> list[Cell]:
        cells = []
        for row, answer in zip(
            rows, byte_perplexities([row.folder for row in rows], work, how=how), strict=True
        ):
            if isinstance(answer, str):
                cells.append(Cell(refusal=answer))
                continue
            nats = sum(log_likelihood(row.student, tokenizer, text) for text in DOCUMENTS)
            expected = math.exp(-nats / sum(len(text.encode()) for text in DOCUMENTS))
            cells.append(Cell(abs(answer / expected - 1)))
        return cells

    def llama_cpp(rows: list[Row]) -> list[Cell]:
        from gguf_plain import convert

        cells = []
        for row in rows:
            file = row.folder.with_suffix(".gguf")
            try:
                convert(row.folder, file)
            except ValueError as error:
                cells.append(Cell(refusal=str(error)))
                continue
            candidates = [tokens(24, seed=seed)[0].tolist() for seed in range(10)] + DOCUMENTS
            prompts, expected = usable_prompts(row.student, tokenizer, candidates)
            found = llama_cpp_likelihoods(file, prompts, row.student.config.vocab_size, flash=flash)
            cells.append(Cell((torch.tensor(found) - expected).abs().max().item()))
        return cells

    return {
        "ours": ours,
        "transformers": transformers,
        "lm_eval": lambda rows: lm_eval(rows, "bare"),
        "lm_eval + lftpipe": lambda rows: lm_eval(rows, "registered"),
        "llama.cpp": llama_cpp,
    }


def markdown(rows: list[Row]) -> list[str]:
    """The table, and below it each refusal's words once."""
    reasons: list[str] = []
    lines = [
        "| family | solver | k | form | " + " | ".join(RUNTIMES) + " |",
        "|" + "---|" * (4 + len(RUNTIMES)),
    ]
    for row in rows:
        shown = []
        for runtime in RUNTIMES:
            cell = row.cells[runtime]
            if not cell.installed:
                shown.append("not installed")
            elif cell.refusal is None:
                shown.append(f"works, {cell.difference:.0e}" if cell.difference else "works, equal")
            else:
                reason = _short(cell.refusal)
                if reason not in reasons:
                    reasons.append(reason)
                shown.append(f"refused ({reasons.index(reason) + 1})")
        lines.append(f"| {row.family} | {row.solver} | {row.k} | {row.form} | " + " | ".join(shown) + " |")
    compared = "; ".join(f"{runtime}: {what}" for runtime, what in RUNTIMES.items())
    lines += ["", f"Numbers: the largest difference from the student that was exported ({compared}).", ""]
    return lines + [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]


def _short(refusal: str) -> str:
    """The first sentence of a refusal, without what differs from student to student."""
    line = " ".join(refusal.split())
    line = re.sub(r"/\S*/", "", re.sub(r"in \d+ steps", "in k steps", line))
    line = re.sub(r"latent_flow_(gpt_neox|llama|qwen2|qwen3)", "latent_flow_*", line)
    return line if " / do: " in line else re.split(r"(?<=[.!]) ", line)[0]


def main() -> None:
    from conftest import make_teachers, make_tokenizer
    from decoders import make_decoders

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flash", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = make_tokenizer()
        teachers = make_teachers(work, ("neox", "llama"), tokenizer)
        teachers |= make_decoders(work, ("qwen2", "qwen3"), tokenizer)
        print("\n".join(markdown(matrix(teachers, work, flash=options.flash))))


if __name__ == "__main__":
    main()
