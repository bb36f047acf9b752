"""`lftpipe export`: a student as a folder that transformers, or any runtime of its family, loads."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lftpipe
from lftpipe import progress, runs
from lftpipe.config.settings import ExportSettings
from lftpipe.device import prepare_processor
from lftpipe.errors import RunError, SettingsError
from lftpipe.report.tables import COLUMNS, markdown_table
from lftpipe.runs import Run
from lftpipe.student.assemble import SOURCE, build_student, teacher_of_run
from lftpipe.student.plain import unroll
from lftpipe.teacher.quiet import quiet_transformers
from lftpipe.teacher.source import Teacher, load_tokenizer
from lftpipe.workspace import find_run

#: Tokens that a plain export's logits are compared with the student's on.
COMPARED_TOKENS = 64


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write a student with tokenizer, generation config and model card.

    Returns
    -------
    dict
        Where it is and what it is made of, JSON-plain.

    Raises
    ------
    LftpipeError
        If a run is missing, damaged, or of a teacher that changed; if the student has no exact plain
        form and one was asked for; or if there is something at the destination and no `--force`.
    """
    prepare_processor(settings.threads)
    if not settings.runs:
        raise SettingsError("export without a run", "the name or path of a run", "name one")
    opened = [runs.open_run(find_run(settings.workspace, settings.store, name)) for name in settings.runs]
    teacher = teacher_of_run(opened[0], settings.workspace)
    student = build_student(teacher, opened, steps=settings.k, solver=settings.solver)
    k = student.config.steps
    out = settings.out or opened[0].path / f"export-{settings.form}-k{k}"
    _check_free(out, settings.force)
    model, difference = student, None
    if settings.form == "plain":
        model = unroll(student)
        difference = _largest_difference(model, student)
    result = {
        "out": str(out),
        "form": settings.form,
        "model_type": model.config.model_type,
        "teacher": teacher.name,
        "blocks": [f"{run.block[0]}:{run.block[1]}" for run in opened],
        "runs": [str(run.path) for run in opened],
        "k": k,
        "solver": student.config.solver,
        "layers": len(model.base_model.layers),
        "attention_evaluations": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": settings.dtype,
        "max_logit_difference": difference,
    }
    card = model_card(result, teacher, opened)
    source = {key: result[key] for key in ("form", "blocks", "runs", "k", "solver")}
    source |= {"teacher": teacher.identity(), "lftpipe": lftpipe.__version__}
    files = {"README.md": card, SOURCE: json.dumps(source, indent=1) + "\n"}
    result["bytes"] = _write(model.to(getattr(torch, settings.dtype)), teacher, files, out)
    return result


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise RunError(f"{out}, which is there already", "a new folder, or --force", "pass --out or --force")
    if not (out / "config.json").is_file():
        raise RunError(
            f"--force on {out}, which is no exported model", "a folder with config.json", "name another --out"
        )


@torch.inference_mode()
def _largest_difference(model: Any, student: Any) -> float:
    """Between the logits of both, over random tokens."""
    generator = torch.Generator().manual_seed(0)
    count = min(COMPARED_TOKENS, student.config.max_position_embeddings)
    tokens = torch.randint(student.config.vocab_size, (1, count), generator=generator)
    return (model(tokens).logits - student(tokens).logits).abs().max().item()


def _write(model: Any, teacher: Teacher, files: dict[str, str], out: Path) -> int:
    """Write everything into a folder beside `out`, then put that in its place; the bytes written."""
    partial = out.with_name(out.name + ".partial")
    old = out.with_name(out.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with progress.task(f"export to {out}", 1, "models") as task, quiet_transformers():
        model.save_pretrained(partial)
        load_tokenizer(teacher).save_pretrained(partial)
        for name, text in files.items():
            (partial / name).write_text(text)
        task.advance(1)
    size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return size


def model_card(result: dict[str, Any], teacher: Teacher, opened: Sequence[Run]) -> str:
    """The README that goes with the weights: from what, how good, how to load."""
    plain = result["form"] == "plain"
    base = teacher.identity()["model"]
    hub_id = base if not Path(base).is_absolute() else teacher.name
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- latent-flow-transformer",
        f"base_model: {hub_id}",
        "---",
        "",
        f"# {teacher.name}, layers {' and '.join(result['blocks'])} as a latent flow",
        "",
        f"The {teacher.num_layers} layers of {hub_id} with "
        + " and ".join(f"layers {run.block[0]} to {run.block[1] - 1}" for run in opened)
        + f" replaced by {'one flow layer' if len(opened) == 1 else 'flow layers'}, run in {result['k']} "
        f"{result['solver']} steps (Latent Flow Transformer, arXiv 2505.14513).",
        "",
    ]
    if plain:
        lines += [
            f"The steps are unrolled exactly into ordinary layers: this is a {result['model_type']} "
            f"checkpoint of {result['layers']} layers that any runtime of that family loads. Its logits "
            f"differ from the flow's by at most {result['max_logit_difference']:.1e} in float32, on random "
            "tokens.",
            "",
        ]
    lines += ["| run | block | objective | seed | training tokens | store |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {run.path.name} | {run.block[0]}:{run.block[1]} | {run.objective} | {run.seed} "
        f"| {run.train_tokens:,} | {run.store_fingerprint[:12]} |"
        for run in opened
    ]
    lines += ["", "## Measured", "", *_measured(result, opened), "", "## Use", "", "```python"]
    if not plain:
        lines.append("import lftpipe.student  # registers the model type; pip install lftpipe")
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]
    if not plain:
        lines.append(f"model.set_steps({result['k']})  # another number of steps, at run time")
    lines += [
        'tokens = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
        "```",
        "",
        f"The terms of {hub_id} hold for these weights, which are made from its.",
    ]
    return "\n".join(lines) + "\n"


def _measured(result: dict[str, Any], opened: Sequence[Run]) -> list[str]:
    """Rows of Table 1 for this student, if `lftpipe evaluate` wrote them."""
    table = opened[0].path.parent.parent / "results.json"
    try:
        rows = json.loads(table.read_text())["rows"]
        rows = [row for row in rows if row["method"] == "teacher" or _is_of(row, result, opened)]
        if len(rows) > 1:
            return markdown_table([{key: row[key] for key in COLUMNS} for row in rows])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no table, or not ours: the card says that there is none
    names = " ".join(run.path.name for run in opened) + (" --together" if len(opened) > 1 else "")
    solver = "" if all(run.solver == result["solver"] for run in opened) else f" --solver {result['solver']}"
    return [f"Not measured yet: `lftpipe evaluate {names} --k {result['k']}{solver}` does."]


def _is_of(row: dict[str, Any], result: dict[str, Any], opened: Sequence[Run]) -> bool:
    """Whether a row was measured on just these weights, run in this way."""
    digests = " + ".join(run.weights_digest for run in opened)
    asked = (digests, result["k"], result["solver"])
    return (row["weights_digest"], row["k"], row["solver"]) == asked


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    lines = [
        f"{result['out']}: {result['model_type']}, {result['layers']} layers, "
        f"{result['parameters']:,} parameters, {progress.human_bytes(result['bytes'])} of {result['dtype']}",
        f"  blocks {', '.join(result['blocks'])} of {result['teacher']}, "
        f"{result['k']} {result['solver']} steps",
    ]
    if result["max_logit_difference"] is not None:
        lines.append(f"  logits differ from the student's by at most {result['max_logit_difference']:.1e}")
    lines.append(f"next: lftpipe generate {result['out']} --prompt TEXT")
    return "\n".join(lines)
