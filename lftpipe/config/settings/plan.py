"""Settings of `lftpipe plan` and `lftpipe compress`: the best shape for a budget, and all stages in one."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Batch,
    ComputeDtype,
    Count,
    File,
    NonNegative,
    OfStore,
    OnDevice,
    Seeded,
    Text,
    Width,
    Widths,
    Writing,
)

Speed = Annotated[float, Field(gt=1, le=1000)]
HeldBack = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Budgeted(OnDevice, Seeded, Writing):
    """A stage that searches for a shape within one budget."""

    size: Width | None = None
    """The student's parameters over the teacher's, embedding and head included. Default: 0.7, where no other
    budget is given."""
    layers: Count | None = None
    """Layers of the student, in place of `--size`."""
    speed: Speed | None = None
    """Decoded tokens a second over the teacher's, as measured here, in place of `--size`."""
    minutes: NonNegative = 30.0
    """Minutes that the search takes, about: candidates are tried in order until they are over."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PlanSettings(OfStore, Budgeted):
    """Of `lftpipe plan`."""

    tokens: Count = 20_000
    """Training tokens of each candidate."""
    batch_tokens: Batch = 512
    """Tokens in one step of a candidate."""
    widths: Widths = (0.75, 0.5, 0.25)
    """Widths of the MLP that every layer is tried at."""
    hold_back: HeldBack = 0.04
    """Fraction of the training sequences that no candidate learns from; shapes are scored on them."""
    compute_dtype: ComputeDtype = "auto"
    """Number format of matrix products."""
    out: File | None = None
    """The JSON file; default: `plan.json` beside the store; all plans share `candidates/` there."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "size layers speed minutes seed device store workspace out force",
        "The candidates": "tokens batch_tokens widths hold_back compute_dtype",
    }


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CompressSettings(Budgeted):
    """Of `lftpipe compress`."""

    model: Text = "pythia-tiny"
    """The teacher, as for `extract`."""
    corpus: Text | None = None
    """Text to learn from, as for `extract`; default: the teacher's own."""
    tokens: Count = 300_000
    """Training tokens."""
    out: File | None = None
    """The checkpoint's folder; default: `<workspace>/<teacher>/student`."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "model size layers speed corpus tokens minutes out seed device workspace force",
    }
