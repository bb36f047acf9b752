"""`lftpipe export`: a student as a folder that transformers, or any runtime of its family, loads."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.outputs import making_folder, refuse_foreign_files
from lftpipe.base.shape import shape_text
from lftpipe.base.version import __version__
from lftpipe.base.workspace import find_run, next_command
from lftpipe.config.settings import ExportSettings
from lftpipe.reporting.cards import student_card
from lftpipe.results.outcomes import Exported
from lftpipe.results.run import SOURCE, ExportSource
from lftpipe.runs import Run
from lftpipe.storage.hub import Repository, require_token
from lftpipe.student.assemble import build_student, teacher_of_run
from lftpipe.student.plain import old_rotary_names, unroll
from lftpipe.student.standalone_modeling import MODULE, auto_map, modelling_file
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher, load_tokenizer, max_positions_of

#: Largest difference of a plain export's logits from the student's, of the largest logit, that is rounding.
ROUNDING = 1e-3

#: Tokens that a plain export's logits are compared with the student's on.
COMPARED_TOKENS = 64


@on_device
def export(settings: ExportSettings) -> Exported:
    """Write a student with tokenizer, generation config and model card.

    Raises `LftpipeError` if a run is missing, damaged, or of a teacher that changed; if the student has no
    exact plain form and one was asked for; or if there is something at the destination and no `--force`.
    """
    if not settings.runs:
        raise SettingsError("export without a run", "the name or path of a run", "name one")
    repository = Repository(settings.push_to_hub, "model") if settings.push_to_hub else None
    if repository is not None:
        require_token()
    paths = [find_run(settings.workspace, settings.store, name) for name in settings.runs]
    opened = sorted(runs.open_runs(paths), key=lambda run: run.block)
    teacher = teacher_of_run(opened[0], settings.workspace)
    student = build_student(teacher, opened, steps=settings.k, solver=settings.solver)
    _refuse_infinite(student, "check run and teacher")
    k = student.config.steps
    out = settings.out or opened[0].path / f"export-{settings.form}-k{k}"
    with making_folder(out) as folder:
        _check_free(out, settings.force, teacher)
        model, difference = _in_form(student, settings.form)
        result = replace(
            _described(settings, teacher, opened, student, model),
            out=str(out),
            max_logit_difference=difference,
        )
        card = student_card(result, teacher, opened, module=MODULE, licence=settings.license)
        model = model.to(getattr(torch, settings.dtype))
        _refuse_infinite(model, f"pass --dtype bfloat16 or float32: {settings.dtype} holds no such number")
        size = _write(model, teacher, card, result, folder)
    result = replace(result, bytes=size)
    if repository is not None:
        result = replace(result, pushed=repository.upload(out, only=["*"], private=settings.private))
    return result


def _refuse_infinite(student: Any, do: str) -> None:
    for name, weight in student.named_parameters():
        if not weight.isfinite().all():
            raise RunError(f"tensor {name} of the student, which is not finite", "numbers", do)


def _in_form(student: Any, form: str) -> tuple[Any, float | None]:
    """The model to write, and by how much a plain one's logits differ from the student's."""
    if form != "plain":
        return student, None
    model = unroll(student)
    difference, largest = _largest_difference(model, student)
    if not difference <= ROUNDING * largest:
        raise RunError(
            f"a plain form with logits up to {difference:.1e} off the student's, of at most {largest:.1e}",
            "the same function",
            "use --form latent-flow",
        )
    return model, difference


def _described(
    settings: ExportSettings, teacher: Teacher, opened: Sequence[Run], student: Any, model: Any
) -> Exported:
    """What there is to say of an export before it is written."""
    parts = [part for run in opened for part in run.parts]
    return Exported(
        out="",
        form=settings.form,
        model_type=model.config.model_type,
        teacher=teacher.name,
        blocks=[f"{part.start}:{part.stop}" for part in parts],
        shape=shape_text(parts, teacher.num_layers),
        runs=[str(run.path) for run in opened],
        k=student.config.steps,
        solver=student.config.solver,
        layers=len(model.get_submodule(teacher.family.layers_prefix)),
        attention_evaluations=model.config.num_hidden_layers,
        parameters=model.num_parameters(),
        dtype=settings.dtype,
        max_logit_difference=None,
        bytes=0,
    )


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
    refuse_foreign_files(out, set(ExportSource.of_folder(out).files), "what `lftpipe export` writes")


@torch.inference_mode()
def _largest_difference(model: Any, student: Any) -> tuple[float, float]:
    """Between the logits of both, over random tokens; and the student's largest."""
    generator = torch.Generator().manual_seed(0)
    count = min(COMPARED_TOKENS, max_positions_of(student.config) or COMPARED_TOKENS)
    tokens = torch.randint(student.config.vocab_size, (1, count), generator=generator)
    ours, theirs = model(tokens).logits, student(tokens).logits
    return (ours - theirs).abs().max().item(), theirs.abs().max().item()


def _write(model: Any, teacher: Teacher, card: str, result: Exported, folder: Path) -> int:
    """Write everything into a folder; the bytes written."""
    with progress.task(f"export to {result.out}", 1, "models") as task, quiet_transformers():
        if result.form == "latent-flow":
            model.config.auto_map = auto_map(model)
            (folder / f"{MODULE}.py").write_text(modelling_file(model), encoding="utf-8")
        model.save_pretrained(folder)
        if result.form == "plain":
            config = json.loads((folder / "config.json").read_text("utf-8")) | old_rotary_names(model.config)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        load_tokenizer(teacher).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = sorted({SOURCE, *(entry.name for entry in folder.iterdir())})
        of_result = {key: getattr(result, key) for key in ("form", "blocks", "runs", "k", "solver")}
        recorded: Any = teacher.identity() | {"tokenizer_digest": teacher.tokenizer_digest}
        source = ExportSource(**of_result, teacher=recorded, lftpipe=__version__, files=files)
        source.write(folder / SOURCE)
        task.advance(1)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def summary(result: Exported) -> str:
    """What was made, where, and what to type next."""
    lines = [
        f"{result.out}: {result.model_type}, {result.layers} layers, "
        f"{result.parameters:,} parameters, {progress.human_bytes(result.bytes)} of {result.dtype}",
        f"  {result.shape} of {result.teacher}, {result.k} {result.solver} steps",
    ]
    if result.max_logit_difference is not None:
        lines.append(f"  logits differ from the student's by at most {result.max_logit_difference:.1e}")
    if result.pushed:
        lines.append(f"  uploaded to {result.pushed}")
    lines.append(next_command("generate", result.out, "--prompt", "TEXT"))
    return "\n".join(lines)
