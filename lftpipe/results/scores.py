"""`results.json`: Table 1, scored over the validation split; and the scores on tasks that it is made from."""

import dataclasses
from typing import Any, ClassVar

from lftpipe.results.base import Artefact, JsonObject, OrAbsent, require

#: Between the runs, and their digests, of a student that several runs make.
JOINED = " + "


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore(JsonObject):
    """What a model reaches on a task of lm_eval, or in the mean over tasks, and how much of its teacher's."""

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
    interval: tuple[float, float] | None = None
    """Of the value, 95 %, by a bootstrap over documents; None where they are few, or it is no mean."""
    kept_interval: tuple[float, float] | None = None
    """Of `kept`, with the same documents drawn for both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuations(JsonObject):
    """What a model's greedy continuations of held-out passages are like."""

    passages: int
    exact: float
    """Fraction whose first four tokens are the passage's own."""
    as_teacher: float
    """Tokens until it leaves what the teacher writes."""
    distinct_2: float
    """Different pairs of neighbouring tokens over all of a text's."""
    repetition: float
    """Fraction of a text's runs of four tokens that were there before in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Artefact):
    """One line of the table: what a predictor is, and what it reached. None is what has no meaning."""

    method: str
    block: str | None = None
    shape: str | None = None
    """What replaces which layers, in short."""
    objective: str | None = None
    solver: str | None = None
    k: int | None = None
    nfe: int | float | None = None
    kl_latent: float | None = None
    nmse: float | None = None
    nmse_without_first: float | None = None
    kl: float | None = None
    ppl: float | None = None
    word_ppl: OrAbsent[float] = None
    """By word, of a text that is scored as a whole."""
    ppl_ratio: float | None = None
    """To the teacher's."""
    agreement: float | None = None
    """Fraction of positions whose most likely token is the teacher's."""
    parameters: int
    layers: int | None = None
    bytes: int | None = None
    """Of all weights in float32."""
    ms_per_token: float | None = None
    run: str | None = None
    seed: int | None = None
    train_tokens: int | None = None
    weights_digest: str | None = None
    kl_interval: OrAbsent[tuple[float, float]] = None
    """95 %, by a bootstrap over documents; None where they are few."""
    ppl_interval: OrAbsent[tuple[float, float]] = None
    ppl_ratio_interval: OrAbsent[tuple[float, float]] = None
    tasks: OrAbsent[dict[str, TaskScore]] = None
    tasks_mean: OrAbsent[TaskScore] = None
    """Of the tasks of which more is better; each counts the same."""
    continuations: OrAbsent[Continuations] = None

    @property
    def weights(self) -> list[str]:
        """The digest of each run that the line was measured on."""
        return self.weights_digest.split(JOINED) if self.weights_digest else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveScore(Score):
    """The line of a predictor whose steps are chosen token by token; `k` is their largest number."""

    nfe_with_keys: float
    threshold: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(JsonObject):
    """The best run against another one, on the same documents."""

    measure: str
    """`kl`, of which less is better, or `tasks_mean`."""
    run: str
    against: str
    difference: float
    """Of the first less the second."""
    interval: tuple[float, float] | None
    p: float
    """Of a sign-flip test over documents that the difference is zero."""
    p_holm: float
    """After Holm's correction for all comparisons of the measure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results(Artefact):
    """The table, and on what it was measured."""

    NAME: ClassVar[str] = "a table of results"
    CURE: ClassVar[str] = "run `lftpipe evaluate --force`"

    teacher: str
    store: str
    store_fingerprint: str
    corpus: str | None = None
    """Where the validation tokens are from; None: the store's own corpus."""
    validation_tokens: int
    documents: OrAbsent[int] = None
    """That the tokens are from; of a text that is scored as a whole, its windows."""
    compute_dtype: str
    settings: dict[str, Any]
    rows: list[Score]
    adaptive: OrAbsent[list[AdaptiveScore]] = None
    comparisons: OrAbsent[list[Comparison]] = None

    def check(self) -> None:
        """There are rows, each run's have steps and figures, and every adaptive row belongs to one."""
        require(bool(self.rows), "rows is empty")
        require(self.validation_tokens > 0, "validation_tokens is not positive")
        for row in self.rows:
            require(row.run is None or (row.k is not None and row.block is not None), f"{row.run} has no k")
        runs = {row.run for row in self.rows}
        for row in self.adaptive or ():
            require(row.run in runs and row.nfe is not None, f"adaptive: {row.run} is not in rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecord(Artefact):
    """A task's metric over its documents, in their order."""

    NAME: ClassVar[str] = "scores of a task"
    CURE: ClassVar[str] = "delete it and run `lftpipe evaluate --tasks` again"

    task: str
    metric: str
    higher_is_better: bool
    value: float
    documents: int
    scores: list[float]
    """Of each document; empty where the metric is no mean over them."""
    chance: list[float]
    """What guessing reaches on each: one over the number of answers, else 0."""

    def check(self) -> None:
        """There are documents, and as many scores if there are any."""
        require(self.documents > 0, "documents is not positive")
        require(len(self.scores) in (0, self.documents), "scores has another length than documents")
        require(len(self.chance) == len(self.scores), "chance has another length than scores")
