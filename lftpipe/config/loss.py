"""The language of `--loss`: terms, weights, stages; the objectives by name, and terms from outside."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lftpipe.base.errors import SettingsError

# --- What the names of objectives stand for. No torch.

#: Fitted in one pass over the store, or not at all; they take no loss and no steps.
CLOSED_FORM = ("linear", "skip", "replaceme", "linearpatch")

#: Learned by ordinary layers that know no time.
TIMELESS = ("regression", "looped", "distil")

#: `distil` puts two layers in the place of so many, or more.
TWO_FOR = 5

#: The `--loss` of an objective whose name is no term.
LOSSES = {
    "looped": "regression",
    "distil": "regression@0.7/regression,logits",
}

#: That of `distil` for students of more than two parts, or with narrow layers.
SHAPED = "local@0.8/logits"


# --- The language of `--loss`: weighted terms, in stages; ours, and those of other packages. No torch.
#
# fw one term fw,sfm:0.001 a weighted sum fw@0.7/fw:0.1,logits seven tenths of the steps on states alone,
# then logits with a little of the states local@0.8/logits four fifths of the steps part by part, then the
# whole student on logits

#: Every term, and what it regresses or compares (lftpipe.training.terms computes them).
TERMS = {
    "fw": "the end of a walk on x_1 (algorithm 2)",
    "sfm": "the velocity on the straight line's derivative (algorithm 1)",
    "trajectory": "the velocity on the derivative of the teacher's own path",
    "branches": "each branch's velocity on its own part of x_1 - x_0",
    "regression": "x_0 plus the layer's output on x_1",
    "local": "the same for each part of a student, on its own cached x_0: no part runs through another",
    "logits": "the student's next-token distribution on the teacher's, through the frozen tail",
    "top-logits": "the same on the teacher's top-K logits, from the store",
    "sampled-logits": "the same, with the student's other logits estimated from a sample",
    "tokens": "the student's next-token distribution on the text itself, through the frozen tail",
}

#: Terms that read the store's logits.
ON_STORED_LOGITS = frozenset({"top-logits", "sampled-logits"})

#: Terms on next-token distributions, through the frozen tail.
ON_LOGITS = ON_STORED_LOGITS | {"logits", "tokens"}


#: The group of entry points: a name, and where the function is.
GROUP = "lftpipe.terms"

_TERM_NAME = re.compile(r"[a-z][a-z0-9-]*")

#: What this process added.
_ADDED: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Stage:
    """A part of training with one weighted sum of terms."""

    fraction: float
    """Of all steps."""
    weights: dict[str, float]
    """By term."""


def parse_loss(text: str) -> tuple[Stage, ...]:
    """Stages of a `--loss`; those without a fraction divide what the others leave.

    Raises
    ------
    SettingsError
        If a term is unknown or named twice, a weight is not positive, or the fractions do not add up to 1.
    """
    parts = [_parse_stage(part.strip(), text) for part in text.split("/")]
    given = [fraction for fraction, _ in parts if fraction is not None]
    left = 1 - sum(given)
    open_parts = len(parts) - len(given)
    if left < -1e-9 or (open_parts and left <= 1e-9) or (not open_parts and left > 1e-9):
        raise SettingsError(
            f"--loss {text}, whose fractions add up to {sum(given):g}",
            "1 over all stages",
            "correct the fractions",
        )
    return tuple(
        Stage(left / open_parts if fraction is None else fraction, weights) for fraction, weights in parts
    )


def _parse_stage(part: str, text: str) -> tuple[float | None, dict[str, float]]:
    sum_, at, fraction = part.partition("@")
    weights: dict[str, float] = {}
    for term in sum_.split(","):
        name, colon, weight = term.strip().partition(":")
        if name not in TERMS and name not in (outside := outside_terms()):
            known = ", ".join((*TERMS, *outside))
            raise SettingsError(
                f"{name!r} in --loss {text}", f"one of {known}", "pass fw, or fw:1,logits:0.1"
            )
        if name in weights:
            raise SettingsError(f"{name} twice in --loss {text}", "each term once", "add up its weights")
        weights[name] = _positive(weight, text) if colon else 1.0
    return (_positive(fraction, text) if at else None), weights


def _positive(number: str, text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+([eE][-+]?\d+)?", number) or not 0 < float(number) < math.inf:
        raise SettingsError(
            f"{number!r} in --loss {text}", "a positive number", "use the format of fw:0.5@0.7"
        )
    return float(number)


def stage_starts(stages: tuple[Stage, ...], num_steps: int) -> tuple[int, ...]:
    """The first step of each stage, and the number of steps at the end."""
    starts, done = [0], 0.0
    for stage in stages:
        done += stage.fraction
        starts.append(round(done * num_steps))
    return (*starts[:-1], num_steps)


def without_logits(weights: dict[str, float]) -> dict[str, float]:
    """The terms on states alone, which may be none."""
    return {term: weight for term, weight in weights.items() if term not in ON_LOGITS}


def add_term(name: str, function: Callable[..., Any]) -> None:
    """Add a term that `--loss` can name, in this process.

    Parameters
    ----------
    name
        Lower-case letters, digits and hyphens; not that of a term of lftpipe. The same name again replaces
        the function, as a notebook's cell does that is run twice.
    function
        From a `lftpipe.training.terms.Problem` to a scalar tensor.

    Raises
    ------
    SettingsError
        If the name is taken or cannot be written in `--loss`.
    """
    if not _TERM_NAME.fullmatch(name) or name in TERMS:
        raise SettingsError(
            f"a term named {name!r}",
            f"lower-case letters, digits and hyphens, and none of {', '.join(TERMS)}",
            "choose another name",
        )
    _ADDED[name] = function


def outside_terms() -> dict[str, Callable[..., Any] | EntryPoint]:
    """By name, what was added here and what installed packages offer; nothing is imported."""
    return {each.name: each for each in entry_points(group=GROUP)} | _ADDED


def load_term(name: str) -> Callable[..., Any]:
    """The function of one of them.

    Parameters
    ----------
    name
        Of the term.

    Raises
    ------
    SettingsError
        If there is none, or its package cannot be imported.
    """
    found = outside_terms().get(name)
    if found is None:
        raise SettingsError(
            f"the term {name!r}, which nothing here computes",
            "a term of lftpipe, of `lftpipe.add_term`, or of an installed package",
            "add it again before you go on with the run",
        )
    if not isinstance(found, EntryPoint):
        return found
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"the term {name!r} of {found.value} ({error})",
            "a function that can be imported",
            "correct the package",
        ) from error
