"""`lftpipe export`: a student as a folder that transformers, or any runtime of its family, loads."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lftpipe
from lftpipe import progress, runs
from lftpipe.artefacts.export import SOURCE, ExportSource
from lftpipe.artefacts.results import Results, Score
from lftpipe.config.settings import ExportSettings
from lftpipe.device import prepare_processor
from lftpipe.errors import LftpipeError, RunError, SettingsError
from lftpipe.outputs import making_folder, refuse_foreign_files
from lftpipe.reporting.tables import escaped, markdown_lines, markdown_table
from lftpipe.runs import Run
from lftpipe.student.assemble import build_student, teacher_of_run
from lftpipe.student.plain import unroll
from lftpipe.student.portable import MODULE, auto_map, modelling_file
from lftpipe.teacher.quiet import quiet_transformers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tokenizer import load_tokenizer
from lftpipe.workspace import find_run

#: What exports of older versions, which do not list their files, consist of.
_OLDER_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|added_tokens|lftpipe)\.json"
    r"|model.*\.safetensors(\.index\.json)?|README\.md|merges\.txt|chat_template\.jinja|tokenizer\.model"
)

_PLAIN_YAML = re.compile(r"[A-Za-z0-9][\w./-]*")

#: Tokens that a plain export's logits are compared with the student's on.
COMPARED_TOKENS = 64


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write a student with tokenizer, generation config and model card.

    Parameters
    ----------
    settings
        Which runs, in which form, and where.

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
    _refuse_nan(student)
    k = student.config.steps
    out = settings.out or opened[0].path / f"export-{settings.form}-k{k}"
    with making_folder(out) as folder:
        _check_free(out, settings.force, teacher)
        model, difference = _in_form(student, settings.form)
        result = _described(settings, teacher, opened, student, model) | {"max_logit_difference": difference}
        card = model_card(result, teacher, opened)
        result["bytes"] = _write(model.to(getattr(torch, settings.dtype)), teacher, card, result, folder)
    return result


def _refuse_nan(student: Any) -> None:
    for name, weight in student.named_parameters():
        if not weight.isfinite().all():
            raise RunError(
                f"tensor {name} of the student, which is not finite", "numbers", "check run and teacher"
            )


def _in_form(student: Any, form: str) -> tuple[Any, float | None]:
    """The model to write, and by how much a plain one's logits differ from the student's."""
    if form != "plain":
        return student, None
    model = unroll(student)
    return model, _largest_difference(model, student)


def _described(
    settings: ExportSettings, teacher: Teacher, opened: Sequence[Run], student: Any, model: Any
) -> dict[str, Any]:
    """What there is to say of an export, JSON-plain."""
    return {
        "out": str(settings.out or opened[0].path / f"export-{settings.form}-k{student.config.steps}"),
        "form": settings.form,
        "model_type": model.config.model_type,
        "teacher": teacher.name,
        "blocks": [f"{run.block[0]}:{run.block[1]}" for run in opened],
        "runs": [str(run.path) for run in opened],
        "k": student.config.steps,
        "solver": student.config.solver,
        "layers": len(model.base_model.layers),
        "attention_evaluations": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": settings.dtype,
    }


def _check_free(out: Path, force: bool, teacher: Teacher) -> None:
    """Refuse to replace anything but an export, with nothing else in its folder, that is not the teacher."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise RunError(f"{out}, which is there already", "a new folder, or --force", "pass --out or --force")
    if Path(teacher.model).exists() and Path(teacher.model).resolve() == out.resolve():
        raise RunError(f"--force on {out}, the student's own teacher", "another folder", "name another --out")
    if not (out / SOURCE).is_file():
        raise RunError(
            f"--force on {out}, which is no exported model", f"a folder with {SOURCE}", "name another --out"
        )
    known = ExportSource.of_folder(out).files
    names = {entry.name for entry in out.iterdir()}
    known = set(known) if known is not None else {name for name in names if _OLDER_FILES.fullmatch(name)}
    refuse_foreign_files(out, known, "what `lftpipe export` writes")


@torch.inference_mode()
def _largest_difference(model: Any, student: Any) -> float:
    """Between the logits of both, over random tokens."""
    generator = torch.Generator().manual_seed(0)
    count = min(COMPARED_TOKENS, student.config.max_position_embeddings)
    tokens = torch.randint(student.config.vocab_size, (1, count), generator=generator)
    return (model(tokens).logits - student(tokens).logits).abs().max().item()


def _write(model: Any, teacher: Teacher, card: str, result: dict[str, Any], folder: Path) -> int:
    """Write everything into a folder; the bytes written."""
    with progress.task(f"export to {result['out']}", 1, "models") as task, quiet_transformers():
        if result["form"] == "latent-flow":
            model.config.auto_map = auto_map(model)
            (folder / f"{MODULE}.py").write_text(modelling_file(model), encoding="utf-8")
        model.save_pretrained(folder)
        load_tokenizer(teacher).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = sorted({SOURCE, *(entry.name for entry in folder.iterdir())})
        of_result = {key: result[key] for key in ("form", "blocks", "runs", "k", "solver")}
        recorded: Any = teacher.identity() | {"tokenizer_digest": teacher.tokenizer_digest}
        source = ExportSource(**of_result, teacher=recorded, lftpipe=lftpipe.__version__, files=files)
        source.write(folder / SOURCE)
        task.advance(1)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def model_card(result: dict[str, Any], teacher: Teacher, opened: Sequence[Run]) -> str:
    """The README that goes with the weights: from what, how good, how to load.

    Parameters
    ----------
    result
        What the export says of itself.
    teacher, opened
        From which it was made.
    """
    base = teacher.identity()["model"]
    hub_id = base if not Path(base).is_absolute() else teacher.name
    named, blocks = escaped(hub_id), escaped(" and ".join(result["blocks"]))
    layers = " and ".join(f"layers {run.block[0]} to {run.block[1] - 1}" for run in opened)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- latent-flow-transformer",
        f"base_model: {hub_id if _PLAIN_YAML.fullmatch(hub_id) else json.dumps(hub_id)}",
        "---",
        "",
        f"# {escaped(teacher.name)}, layers {blocks} as a latent flow",
        "",
        f"The {teacher.num_layers} layers of {named} with {layers} replaced by "
        f"{'one flow layer' if len(opened) == 1 else 'flow layers'}, run in {result['k']} "
        f"{result['solver']} steps (Latent Flow Transformer, arXiv 2505.14513).",
        "",
        *_unrolled(result),
        *_trained(opened),
        "",
        "## Measured",
        "",
        *_measured(result, opened),
        "",
        *_usage(result),
        "",
        f"The terms of {named} hold for these weights, which are made from its.",
    ]
    return "\n".join(lines) + "\n"


def _unrolled(result: dict[str, Any]) -> list[str]:
    """What a plain export is."""
    if result["form"] != "plain":
        return []
    return [
        f"The steps are unrolled exactly into ordinary layers: this is a {result['model_type']} "
        f"checkpoint of {result['layers']} layers that any runtime of that family loads. Its logits "
        f"differ from the flow's by at most {result['max_logit_difference']:.1e} in float32, on random "
        "tokens.",
        "",
    ]


def _trained(opened: Sequence[Run]) -> list[str]:
    """The table of the runs."""
    rows = [
        [
            run.path.name,
            f"{run.block[0]}:{run.block[1]}",
            run.label,
            str(run.seed),
            f"{run.train_tokens:,}",
            run.store_fingerprint[:12],
        ]
        for run in opened
    ]
    return markdown_lines(["run", "block", "objective", "seed", "training tokens", "store"], rows)


def _usage(result: dict[str, Any]) -> list[str]:
    """How to load it."""
    plain = result["form"] == "plain"
    trust = "" if plain else ", trust_remote_code=True"
    return [
        "## Use",
        "",
        *([] if plain else [f"`{MODULE}.py` has the student's classes; lftpipe need not be installed.", ""]),
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        *([] if plain else [f"model.set_steps({result['k']})  # another number of steps, at run time"]),
        'tokens = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
        "```",
    ]


def _measured(result: dict[str, Any], opened: Sequence[Run]) -> list[str]:
    """Rows of Table 1 for this student, if `lftpipe evaluate` wrote them."""
    table = opened[0].path.parent.parent / "results.json"
    try:
        rows = Results.from_json(table).rows
    except (OSError, LftpipeError):
        rows = []  # no table, or a damaged one: the card says that there is none
    rows = [row for row in rows if row.method == "teacher" or _is_of(row, result, opened)]
    if len(rows) > 1:
        return markdown_table(rows)
    names = " ".join(run.path.name for run in opened) + (" --together" if len(opened) > 1 else "")
    solver = "" if all(run.solver == result["solver"] for run in opened) else f" --solver {result['solver']}"
    return [f"Not measured yet: `lftpipe evaluate {names} --k {result['k']}{solver}` does."]


def _is_of(row: Score, result: dict[str, Any], opened: Sequence[Run]) -> bool:
    """Whether a row was measured on just these weights, run in this way."""
    digests = " + ".join(run.weights_digest for run in opened)
    asked = (digests, result["k"], result["solver"])
    return (row.weights_digest, row.k, row.solver) == asked


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
