"""What a model scores on a task, document by document: kept, so that no task runs twice for a model."""

import dataclasses
from typing import ClassVar

from lftpipe.results.base import Artefact, require


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
