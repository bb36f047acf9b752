"""`lftpipe generate`: continue a prompt with a student, beside its teacher, or as its teacher's draft."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import TextIOBase
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import LogitsProcessor

from lftpipe import runs
from lftpipe.base.device import on_device
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.outputs import one_writer
from lftpipe.base.workspace import find_run
from lftpipe.config.refusal import as_option
from lftpipe.config.settings import GenerateSettings
from lftpipe.fusion import FusionLogitsProcessor
from lftpipe.results.outcomes import BesideTeacher, Drafted, Drafting, Generation, WriterFacts, Written
from lftpipe.results.run import SAMPLES, Sample, keep_sample
from lftpipe.student.assemble import (
    build_student,
    language_model,
    load_model,
    load_teacher,
    teacher_of_folder,
    teacher_of_run,
    without_layers,
)
from lftpipe.student.decoding import Continuation, Sampling, continue_prompt, speculate, warm_up
from lftpipe.student.model import LatentFlow
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import Teacher, load_tokenizer, max_positions_of, prompt_tokens, tokenizer_of

#: The command line hands this stage a stream to write words to while they are made.
STREAMS = True


@dataclass(frozen=True)
class Writer:
    """A model ready to write, its tokenizer, and from where it came."""

    model: Any
    tokenizer: Any
    path: Path
    is_run: bool

    @property
    def facts(self) -> WriterFacts:
        """Where it is, and a student's steps."""
        if not _has_steps(self.model):
            return WriterFacts(model=str(self.path))
        config = self.model.config
        blocks = [place for place in config.places() if not isinstance(place, int)]
        nfe = sum(1 if block.kind == "linear" else config.evaluations(block) for block in blocks)
        return WriterFacts(model=str(self.path), k=config.steps, solver=config.solver, nfe=nfe)


def _has_steps(model: Any) -> bool:
    return isinstance(model, LatentFlow)


@on_device
def generate(settings: GenerateSettings, out: TextIOBase | None = None) -> Generation | Drafting:
    """Continue a prompt.

    `out`: where to write words as they are made; None writes nothing.
    Returns text and speed; with `compare` and `draft` also the other models'.
    Raises `LftpipeError` if the model is missing, damaged, or of a teacher that changed, or the prompt does
    not fit.
    """
    _check(settings)
    assert settings.prompt is not None
    if settings.draft is not None:
        return _drafted(settings, settings.prompt, out)
    writer = _open(settings, settings.target or "")
    if settings.keep and not writer.is_run:
        raise RunError(f"--keep for {writer.path}, a folder", "a run", "name the run it was exported from")
    _check_prompt(writer, settings.prompt, settings)
    if settings.compare or settings.keep:
        written, beside = _compared(settings, settings.prompt, writer)
    else:
        with quiet_transformers():
            written = _write(
                writer.model, writer.tokenizer, settings, out, _other(writer, settings)
            ).summary()
            beside = None
    return Generation(
        prompt=settings.prompt,
        seed=settings.seed,
        **asdict(_sampling(settings)),
        writer=writer.facts,
        written=written,
        beside=beside,
    )


def _compared(settings: GenerateSettings, prompt: str, writer: Writer) -> tuple[Written, BesideTeacher]:
    """The student's text beside its teacher's; kept with the run if that is asked for."""
    teacher = _teacher_of(writer, settings)
    with quiet_transformers():
        models = (writer.model, load_teacher(teacher).to(settings.device))
        for model in models:
            warm_up(model, writer.tokenizer, prompt)
        ours, theirs = (_write(model, writer.tokenizer, settings, None) for model in models)
    facts, common = writer.facts, _common(ours.tokens, theirs.tokens)
    kept = None
    if settings.keep:
        kept = writer.path / SAMPLES
        sample = Sample(
            run=writer.path.name,
            prompt=prompt,
            teacher=teacher.name,
            teacher_text=theirs.text,
            student_text=ours.text,
            common_tokens=common,
            k=facts.k,
            solver=facts.solver,
            seed=settings.seed,
            **asdict(_sampling(settings)),
        )
        with one_writer(writer.path):
            keep_sample(kept, sample)
    return ours.summary(), BesideTeacher(
        name=teacher.name,
        written=theirs.summary(),
        common_tokens=common,
        speed_up=round(ours.tokens_per_second / theirs.tokens_per_second, 4),
        kept=str(kept) if kept else None,
    )


def _check(settings: GenerateSettings) -> None:
    if not settings.prompt:
        raise SettingsError("generate without a prompt", "some text to continue", "pass --prompt TEXT")
    if (settings.target is None) == (settings.draft is None):
        given = "both a model and --draft" if settings.target else "generate without a model"
        raise SettingsError(
            given, "a run or folder, or --draft RUN (its teacher writes then)", "name one of the two"
        )
    drawn = [name for name in ("top_k", "top_p") if getattr(settings, name) != getattr(Sampling, name)]
    if drawn and not settings.temperature:
        raise SettingsError(
            f"{as_option(drawn[0])} with --temperature 0",
            "tokens that are drawn: the most likely one is always among the most likely",
            "pass --temperature 1, or leave it out",
        )
    forbidden = {
        "--temperature": settings.temperature,
        "--repetition-penalty": settings.repetition_penalty != Sampling.repetition_penalty,
        "--compare": settings.compare,
        "--keep": settings.keep,
        "--with": settings.fused_with is not None,
    }
    if settings.draft is not None and any(forbidden.values()):
        option = next(name for name, given in forbidden.items() if given)
        raise SettingsError(
            f"--draft with {option}", "greedy text, compared with the teacher's anyway", f"leave out {option}"
        )
    if settings.fused_with is not None and (settings.compare or settings.keep):
        raise SettingsError(
            "--with beside --compare or --keep", "the text of two models alone", "leave out one of them"
        )


def _open(settings: GenerateSettings, name: str) -> Writer:
    """A run's student, or the model in a folder."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        model: Any = load_model(folder)
        if settings.k or settings.solver:
            if not _has_steps(model):
                raise RunError(
                    f"--k or --solver for {folder}, a {model.config.model_type} model",
                    "a latent-flow student: only they have steps",
                    "leave them out, or name the run",
                )
            model.set_steps(settings.k or model.config.steps, settings.solver)
        tokenizer = tokenizer_of(folder, RunError, "export it again")
        return Writer(model.to(settings.device), tokenizer, folder, False)
    path = find_run(settings.workspace, settings.store, name)
    opened = [runs.open_run(path)]
    teacher = teacher_of_run(opened[0], settings.workspace)
    student = build_student(teacher, opened, steps=settings.k, solver=settings.solver)
    return Writer(student.to(settings.device), load_tokenizer(teacher), path, True)


def _teacher_of(writer: Writer, settings: GenerateSettings) -> Teacher:
    if writer.is_run:
        return teacher_of_run(runs.open_run(writer.path), settings.workspace)
    return teacher_of_folder(writer.path, settings.workspace)


def _check_prompt(writer: Writer, prompt: str, settings: GenerateSettings) -> None:
    """Refuse a prompt that the model has no place or no embedding for."""
    tokens, config = prompt_tokens(writer.tokenizer, prompt), writer.model.config
    count, most = len(tokens), max_positions_of(config)
    if most is not None and count + settings.max_new_tokens > most:
        raise SettingsError(
            f"a prompt of {count} tokens and --max-new-tokens {settings.max_new_tokens}",
            f"at most {most} together, the teacher's context",
            "shorten the prompt or lower --max-new-tokens",
        )
    if max(tokens) >= config.vocab_size:
        unknown = max(tokens)
        raise SettingsError(
            f"a prompt with token {unknown}, {writer.tokenizer.convert_ids_to_tokens(unknown)!r}",
            f"tokens below {config.vocab_size}, the model's vocabulary: it has no embedding of others",
            "write the prompt without it, or put the model's own tokenizer.json into its folder",
        )


def _sampling(settings: GenerateSettings) -> Sampling:
    return Sampling(**{each.name: getattr(settings, each.name) for each in fields(Sampling)})


def _other(writer: Writer, settings: GenerateSettings) -> list[LogitsProcessor]:
    """What corrects the writer's tokens."""
    if settings.fused_with is None:
        return []
    other = language_model(settings.fused_with, settings.workspace, settings.store)
    model = other.model.to(settings.device)
    return [FusionLogitsProcessor(model, other.tokenizer, writer.tokenizer, weight=settings.weight)]


def _write(
    model: Any,
    tokenizer: Any,
    settings: GenerateSettings,
    out: TextIOBase | None,
    processors: Sequence[LogitsProcessor] = (),
) -> Continuation:
    torch.manual_seed(settings.seed)
    assert settings.prompt is not None
    if out is not None:
        out.write(settings.prompt)
    sampling = _sampling(settings)
    return continue_prompt(
        model,
        tokenizer,
        settings.prompt,
        settings.max_new_tokens,
        sampling=sampling,
        out=out,
        processors=processors,
    )


def _drafted(settings: GenerateSettings, prompt: str, out: TextIOBase | None) -> Drafting:
    """The teacher alone, with the student as its draft, and with a draft that skips the block."""
    draft = _open(settings, settings.draft or "")
    _check_prompt(draft, prompt, settings)
    if not draft.is_run:
        raise RunError(f"--draft {settings.draft}, a folder", "a run", "name the run it was exported from")
    opened = [runs.open_run(draft.path)]
    teacher = teacher_of_run(opened[0], settings.workspace)
    count = settings.max_new_tokens
    with quiet_transformers():
        model = load_teacher(teacher).to(settings.device)
        skipping = without_layers(model, teacher, opened[0].shortened)
        for each in (model, draft.model, skipping):
            warm_up(each, draft.tokenizer, prompt)
        alone = continue_prompt(model, draft.tokenizer, prompt, count)
        if out is not None:
            out.write(prompt)
        ours = speculate(model, draft.model, draft.tokenizer, prompt, count, out=out)
        skip = speculate(model, skipping, draft.tokenizer, prompt, count)
    return Drafting(
        prompt=prompt,
        teacher=teacher.name,
        draft=draft.facts,
        written=ours.summary(alone),
        teacher_alone=alone.summary(),
        skip_draft=skip.summary(alone),
    )


def _common(ours: list[int], theirs: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return min(len(ours), len(theirs))


def summary(result: Generation | Drafting) -> str | Table:
    """Speed; the text was streamed. With `compare`, both texts side by side."""
    if isinstance(result, Drafting):
        return _draft_summary(result)
    if result.beside is not None:
        return _side_by_side(result, result.beside)
    written = result.written
    return f"{written.new_tokens} tokens, {written.tokens_per_second:.1f} tokens/s{_steps(result.writer)}"


def _steps(facts: WriterFacts) -> str:
    if not facts.k:
        return ""
    return f", {facts.k} {facts.solver} step{'s' if facts.k > 1 else ''} (NFE {facts.nfe})"


def _side_by_side(result: Generation, beside: BesideTeacher) -> Table:
    from rich.markup import escape

    table = Table(title=escape(result.prompt), show_lines=True)
    ours, theirs = result.written, beside.written
    for written, name in ((theirs, f"teacher {beside.name}"), (ours, f"student{_steps(result.writer)}")):
        speed = f"{written.tokens_per_second:.1f} tokens/s"
        table.add_column(f"{escape(name)}: {speed}", ratio=1, overflow="fold")
    table.add_row(escape(theirs.text), escape(ours.text))
    table.caption = (
        f"the first {beside.common_tokens} tokens agree; student at {beside.speed_up:.2f} of the speed"
    )
    if beside.kept:
        table.caption += f"; kept in {escape(beside.kept)}"
    return table


def _draft_summary(result: Drafting) -> str:
    lines = [f"teacher alone: {result.teacher_alone.tokens_per_second:.1f} tokens/s"]
    named: tuple[tuple[str, Drafted], ...] = (
        (f"drafted by the student{_steps(result.draft)}", result.written),
        ("drafted by skipping", result.skip_draft),
    )
    for name, text in named:
        rate, proposed = text.acceptance_rate, text.proposed_tokens
        accepted = "nothing proposed" if rate is None else f"{100 * rate:.0f} % of {proposed} accepted"
        same = "the same text" if text.equals_teacher else "ANOTHER TEXT than the teacher's"
        speed = f"{text.tokens_per_second:.1f} tokens/s ({text.speed_up:.2f}x)"
        lines.append(f"{name}: {speed}, {accepted}, {same}")
    return "\n".join(lines)
