"""Settings of `recognise` and `fuse`."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from lftpipe.config.refusal import check_unicode
from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Count,
    File,
    Fraction,
    Names,
    OfStore,
    OnDevice,
    Role,
    Text,
    Writing,
)

Prompt = Annotated[str, AfterValidator(check_unicode)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecogniseSettings(OnDevice, Writing):
    """Of `lftpipe recognise`."""

    files: Names = ()
    """Recordings (.wav), images of a line of text, or posteriors (.npz)."""
    recogniser: Text | None = None
    """`pp-ocrv4`, an .onnx file of its kind, a folder or Hub id of Whisper's kind, or `npz`: posteriors of
    another program."""
    store: File | None = None
    """Where to keep what was heard; default: `heard.zarr` in the workspace."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "recogniser store device workspace force"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FuseSettings(OfStore, OnDevice, Writing):
    """Of `lftpipe fuse`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """The language model: a run, a folder in transformers' format, or a teacher."""
    heard: File | None = None
    """What `lftpipe recognise` kept; default: `heard.zarr` in the workspace."""
    weight: Fraction = 0.2
    """Of the language model; 0 is the recogniser alone."""
    weights: Annotated[tuple[Fraction, ...], Field(strict=False)] = ()
    """Several: the best on one half of the inputs is measured on the other. Needs `--references`."""
    prompt: Prompt = ""
    """What the language model has read before."""
    context: Literal["none", "previous"] = "none"
    """`previous`: the texts recognised before are part of the prompt, a line each."""
    beams: Count = 5
    """Hypotheses that are followed at a time."""
    candidates: Count = 10
    """Units of each hypothesis that the language model scores, the recogniser's best first."""
    timing: Literal["exact", "delayed"] = "exact"
    """`delayed`: the language model scores each hypothesis one unit late, as GFD's authors do."""
    spellings: Literal["canonical", "main", "all"] = "canonical"
    """Which token sequences of a text count."""
    end: Literal["none", "eos", "newline"] = "none"
    """What closes a text for the language model."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Token sequences with less than this part of a text's probability are not evaluated."""
    references: File | None = None
    """The true texts, a line for each input, in the order in which they were recognised."""
    compare: bool = False
    """Also measure the recogniser alone, its best texts rescored, GFD's formula, and for a run its teacher
    and its skipped block. Needs `--references`."""
    language: Text | None = None
    """Spoken language, for recognisers of several, such as `en`."""
    out: File | None = None
    """The JSON file; default: `fused.json` beside what was heard."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "heard weight weights prompt context references compare out device store workspace force",
        "The search": "beams candidates timing spellings end tolerance language",
    }
