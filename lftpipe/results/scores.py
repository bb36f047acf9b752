"""`results.json`: Table 1, scored over the validation split."""

import dataclasses
from typing import Any, ClassVar

from lftpipe.results.base import READ_STRICTLY, Artefact, JsonObject, require

#: Between the runs, and their digests, of a student that several runs make.
JOINED = " + "


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore(JsonObject):
    """What a model reaches on a task of lm_eval, or in the mean over tasks, and how much of its teacher's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = READ_STRICTLY

    metric: str
    value: float
    stderr: float | None
    """None where the metric is no mean over documents."""
    teacher: float
    kept: float | None
    """Fraction of the teacher's; of a perplexity, the teacher's over the model's."""
    kept_above_chance: float | None
    """The same after what guessing reaches is taken from both; None where the teacher does not beat it."""
    chance: float
    documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Artefact):
    """One line of the table: what a predictor is, and what it reached. None is what has no meaning."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"tasks", "tasks_mean"})

    method: str
    block: str | None = None
    objective: str | None = None
    solver: str | None = None
    k: int | None = None
    nfe: int | float | None = None
    kl_latent: float | None = None
    nmse: float | None = None
    nmse_without_first: float | None = None
    kl: float | None = None
    ppl: float | None = None
    ppl_ratio: float | None = None
    """To the teacher's."""
    agreement: float | None = None
    """Fraction of positions whose most likely token is the teacher's."""
    parameters: int
    ms_per_token: float | None = None
    run: str | None = None
    seed: int | None = None
    train_tokens: int | None = None
    weights_digest: str | None = None
    tasks: dict[str, TaskScore] | None = None
    tasks_mean: TaskScore | None = None
    """Of the tasks of which more is better; each counts the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveScore(Score):
    """The line of a predictor whose steps are chosen token by token; `k` is their largest number."""

    nfe_with_keys: float
    threshold: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results(Artefact):
    """The table, and on what it was measured."""

    NAME: ClassVar[str] = "a table of results"
    CURE: ClassVar[str] = "run `lftpipe evaluate --force`"
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"adaptive"})

    teacher: str
    store: str
    store_fingerprint: str
    corpus: str | None = None
    """Where the validation tokens are from; None: the store's own corpus."""
    validation_tokens: int
    compute_dtype: str
    settings: dict[str, Any]
    rows: list[Score]
    adaptive: list[AdaptiveScore] | None = None

    def check(self) -> None:
        """There are rows, each run's have steps and figures, and every adaptive row belongs to one."""
        require(bool(self.rows), "rows is empty")
        require(self.validation_tokens > 0, "validation_tokens is not positive")
        for row in self.rows:
            require(row.run is None or (row.k is not None and row.block is not None), f"{row.run} has no k")
        runs = {row.run for row in self.rows}
        for row in self.adaptive or ():
            require(row.run in runs and row.nfe is not None, f"adaptive: {row.run} is not in rows")
