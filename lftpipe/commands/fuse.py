"""`lftpipe fuse`: correct what a recogniser heard by a language model, step by step, and measure it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import SettingsError
from lftpipe.base.outputs import making
from lftpipe.base.workspace import require_json_name
from lftpipe.config.settings import FuseSettings, to_json
from lftpipe.evaluation.statistics import interval_of, resampled
from lftpipe.fusion.byte_model import ByteModel
from lftpipe.fusion.encoders import open_whisper
from lftpipe.fusion.errors import character_errors, word_errors
from lftpipe.fusion.recogniser import CtcRecogniser, Recogniser, Seq2SeqRecogniser
from lftpipe.fusion.search import Heard, Search, rescored
from lftpipe.fusion.vocabulary import Vocabulary
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.fusion import Fused, FusedText, Fusion, FusionRow
from lftpipe.store.heard import HeardStore, Input
from lftpipe.student.assemble import LanguageModel, beside, language_model
from lftpipe.teacher.silence import quiet_transformers

#: The keys by which the file is known as ours.
MARKS = (b'"tuning"', b'"heard"')


@dataclass(frozen=True)
class _Inputs:
    """What was heard, ready to be searched, with the true texts if they are known."""

    kept: list[Input]
    recogniser: Callable[[Input], Recogniser]
    truths: list[str] | None

    def part(self, half: int) -> "_Inputs":
        """Every second input: weights are tuned on half 0 and measured on half 1."""
        truths = self.truths[half::2] if self.truths else None
        return replace(self, kept=self.kept[half::2], truths=truths)


@on_device
def fuse(settings: FuseSettings) -> Fused:
    """Search for the texts of all inputs.

    Raises `LftpipeError` if the model or what was heard is missing or damaged, or options do not fit each
    other.
    """
    heard = settings.heard or settings.workspace / "heard.zarr"
    out = settings.out or heard.with_name("fused.json")
    _check(settings, out)
    assert settings.target is not None
    inputs = _inputs(settings, HeardStore.open(heard))
    with making(out, marks=MARKS, force=settings.force) as staging, quiet_transformers():
        named = language_model(settings.target, settings.workspace, settings.store)
        language = _byte_model(named, settings)
        tuning: dict[str, float] = {}
        weight, measured = settings.weight, inputs
        if settings.weights:
            for each in settings.weights:
                row, _ = _measured("tuning", named.name, inputs.part(0), language, settings, weight=each)
                tuning[f"{each:g}"] = row.cer
            weight, measured = float(min(tuning, key=tuning.__getitem__)), inputs.part(1)
        texts, rows = _rows(settings, named, language, measured, weight)
        fusion = Fusion(
            model=named.name, heard=str(heard), weight=weight, settings=to_json(settings), texts=texts,
            rows=rows, tuning=tuning,
        )  # fmt: skip
        fusion.write(staging.path(out))
    return Fused(fusion=fusion, out=str(out))


def _check(settings: FuseSettings, out: Path) -> None:
    require_json_name(out)
    if settings.target is None:
        raise SettingsError("fuse without a model", "a run, a folder or a teacher", "name one")
    if (settings.compare or settings.weights) and settings.references is None:
        option = "--compare" if settings.compare else "--weights"
        raise SettingsError(f"{option} without --references", "the true texts", "pass --references FILE")
    if settings.candidates < settings.beams:
        raise SettingsError(
            f"--candidates {settings.candidates} for {settings.beams} beams", "at least as many", "raise them"
        )


def _inputs(settings: FuseSettings, store: HeardStore) -> _Inputs:
    truths = None
    if settings.references is not None:
        truths = settings.references.read_text(encoding="utf-8").splitlines()
        if len(truths) != len(store.inputs):
            raise SettingsError(
                f"{len(truths)} lines in {settings.references} for {len(store.inputs)} inputs",
                "a line for each",
                "give them in the order in which they were recognised",
            )
    if store.recogniser["kind"] == "ctc":
        return _Inputs(store.inputs, lambda each: CtcRecogniser(store.read(each), store.labels), truths)
    model, tokenizer = open_whisper(store.recogniser["name"], settings.device)
    if settings.language:
        tokenizer.set_prefix_tokens(language=settings.language, task="transcribe", predict_timestamps=False)
    begin, vocabulary = _begin(tokenizer), Vocabulary(tokenizer)

    def decoder(each: Input) -> Recogniser:
        return Seq2SeqRecogniser(model, vocabulary, torch.from_numpy(store.read(each)), begin)

    return _Inputs(store.inputs, decoder, truths)


def _begin(tokenizer: Any) -> list[int]:
    """The tokens that begin a transcription, without time stamps."""
    prefix = list(getattr(tokenizer, "prefix_tokens", []))
    no_times = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    return prefix if no_times in prefix or no_times is None else [*prefix, no_times]


def _byte_model(named: LanguageModel, settings: FuseSettings) -> ByteModel:
    return ByteModel(
        named.model.to(settings.device),
        named.tokenizer,
        spellings=settings.spellings,
        tolerance=0.0 if settings.spellings == "main" else settings.tolerance,
    )


def _rows(
    settings: FuseSettings, named: LanguageModel, language: ByteModel, inputs: _Inputs, weight: float
) -> tuple[list[FusedText], list[FusionRow]]:
    ours, found = _measured("fused", named.name, inputs, language, settings, weight=weight)
    texts = [FusedText(input=each.name, **vars(best)) for each, best in zip(inputs.kept, found, strict=True)]
    if not inputs.truths:
        return texts, []
    if not settings.compare:
        return texts, [ours]
    alone, _ = _measured("recogniser alone", None, inputs, None, settings, weight=0.0)
    cascade, _ = _measured("rescored", named.name, inputs, language, settings, weight=weight, rescore=True)
    main = replace(settings, spellings="main", timing="delayed")
    late = _byte_model(named, main)
    gfd, _ = _measured("fused, delayed (GFD)", named.name, inputs, late, main, weight=weight)
    others = [
        _measured("fused", other.name, inputs, _byte_model(other, settings), settings, weight=weight)[0]
        for other in beside(settings.target or "", settings.workspace, settings.store)
    ]
    return texts, [alone, cascade, gfd, ours, *others]


def _measured(
    method: str,
    model: str | None,
    inputs: _Inputs,
    language: ByteModel | None,
    settings: FuseSettings,
    *,
    weight: float,
    rescore: bool = False,
) -> tuple[FusionRow, list[Heard]]:
    started = time.monotonic()
    found = list(_searched(inputs, language, settings, weight, rescore))
    pairs = list(zip(inputs.truths or [], (best.text for best in found), strict=False))
    characters = np.array([character_errors(*pair) for pair in pairs], float).reshape(-1, 2)
    words = np.array([word_errors(*pair) for pair in pairs], float).reshape(-1, 2)
    intervals = [interval_of(resampled([(each[:, 0], each[:, 1])])) for each in (characters, words)]
    row = FusionRow(
        method=method,
        model=model,
        weight=weight,
        inputs=len(found),
        cer=_rate(characters),
        cer_interval=list(intervals[0]) if intervals[0] else None,
        wer=_rate(words),
        wer_interval=list(intervals[1]) if intervals[1] else None,
        seconds=round(time.monotonic() - started, 2),
    )
    return row, found


def _rate(errors: np.ndarray) -> float:
    return float(errors[:, 0].sum() / max(errors[:, 1].sum(), 1))


def _searched(
    inputs: _Inputs, language: ByteModel | None, settings: FuseSettings, weight: float, rescore: bool
) -> Iterator[Heard]:
    """The best text of each input; what was recognised before is part of the prompt, if that is asked for."""
    search = Search(
        weight=0.0 if rescore else weight,
        beams=settings.beams,
        candidates=settings.candidates,
        timing=settings.timing,
        end=settings.end,
    )
    before: list[str] = []
    with progress.task("fuse", len(inputs.kept), "inputs") as task:
        for each in inputs.kept:
            prompted = language and _prompted(language, settings, before)
            found = search.best(inputs.recogniser(each), prompted)
            if rescore and prompted:
                found = rescored(found, prompted, weight)
            task.advance(1)
            if settings.context == "previous":
                before.append(found[0].text)
            yield found[0]


def _prompted(language: ByteModel, settings: FuseSettings, before: list[str]) -> ByteModel:
    """Behind the prompt and the latest texts that leave half of the model's positions free."""
    room, lines = language.most_positions // 2, list(before)
    while True:
        prompt = settings.prompt + "".join(f"{line}\n" for line in lines)
        if not lines or len(language.vocabulary.canonical(prompt.encode())) <= room:
            return language.with_prompt(prompt) if prompt else language
        lines.pop(0)


def summary(result: Fused) -> str | FittedTable:
    """The texts, or with references a table of errors."""
    fusion = result.fusion
    if not fusion.rows:
        return "\n".join([each.text for each in fusion.texts] + [f"written to {result.out}"])
    texts = [Column(each, "left", folds=True) for each in ("method", "model")]
    columns = [*texts, *map(Column, ("weight", "CER %", "WER %", "s"))]
    rows = [
        [
            row.method, row.model or "", f"{row.weight:g}", _percent(row.cer, row.cer_interval),
            _percent(row.wer, row.wer_interval), f"{row.seconds:.1f}",
        ]
        for row in fusion.rows
    ]  # fmt: skip
    return FittedTable(columns, rows, title=f"{fusion.rows[0].inputs} inputs, written to {result.out}")


def _percent(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
