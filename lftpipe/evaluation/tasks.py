"""Tasks of lm_eval: what teacher and students score on them. Only for who has lm_eval installed."""

import contextlib
import io
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError, foreign
from lftpipe.base.files import fingerprint
from lftpipe.config.settings import EvaluateSettings
from lftpipe.evaluation.humaneval import NAME, Problem, load_problems, score_humaneval
from lftpipe.evaluation.scoring import compared_with
from lftpipe.evaluation.statistics import Interval, Stratum, difference, interval_of, of_means, resampled
from lftpipe.results.scores import Comparison, TaskRecord, TaskScore

#: Metrics that count where a task has several, the first of them first.
METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")

#: Tasks whose answers have one length: the field gives their plain accuracy.
PLAIN_ACCURACY = frozenset({"boolq", "copa", "winogrande"})

#: Of the draw of examples that some tasks show first; lm_eval's own.
SEED = 1234

#: Tokens of a request, by which `--batch-tokens` becomes a number of requests.
REQUEST_TOKENS = 128

#: Batches of requests in one part of the work, after which progress is shown.
BATCHES_A_PART = 8

Tasks = Mapping[str, Any]
"""By name, as lm_eval loads them."""


def load_tasks(wanted: str) -> Tasks:
    """The tasks, or those of the groups, with these names, or all of a folder of YAML files.

    Raises `SettingsError` if there is no such task, its documents cannot be loaded, or it runs what the model
    writes.
    """
    folder = Path(wanted) if Path(wanted).is_dir() else None
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        names = manager.all_subtasks if folder else [name for name in wanted.split(",") if name]
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown or not names:
            raise SettingsError(
                f"--tasks {wanted}, with {f'no task {unknown[0]}' if unknown else 'no task in it'}",
                "names of lm_eval's tasks with commas between, or a folder of its YAML files",
                "`lm_eval ls tasks` lists the names",
            )
        with foreign(
            SettingsError, f"--tasks {wanted}", "tasks that can be loaded", "check the network and the files"
        ):
            loaded = manager.load(names)["tasks"]
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SettingsError(
                f"--tasks {name}, which runs code that the model writes", "other tasks", "leave it out"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return loaded


_HFLM: Any = HFLM  # its decorator hides its type


class LanguageModel(_HFLM):
    """A model as lm_eval asks it, in parts with our progress between them."""

    def __init__(self, label: str, model: Any, tokenizer: Any, *, batch: int, dtype: torch.dtype) -> None:
        with _quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch,
                softmax_dtype=torch.float32,
                mixed_precision_dtype=None if dtype == torch.float32 else dtype,
            )
        self._label, self._shown = label, sys.stderr

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Nats of an answer after its question."""
        return self._in_parts(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Nats of a whole text."""
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """What the model writes."""
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, ask: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        """The longest first, so that a batch is padded little; one question's answers side by side."""
        order = sorted(range(len(requests)), key=lambda index: _size(requests[index].args))
        answers: list[Any] = [None] * len(requests)
        size = BATCHES_A_PART * self.batch_size
        # lm_eval's own bars are silenced; this line goes where they would have gone.
        with contextlib.redirect_stderr(self._shown):
            label = f"{self._label} on {requests[0].task_name}"
            with progress.task(label, len(requests), "requests") as task:
                for first in range(0, len(order), size):
                    part = order[first : first + size]
                    with contextlib.redirect_stderr(io.StringIO()):
                        found = ask([requests[index] for index in part], disable_tqdm=True)
                    for index, answer in zip(part, found, strict=True):
                        answers[index] = answer
                    task.advance(len(part))
        return answers


def _size(arguments: tuple[Any, ...]) -> tuple[int, str]:
    return -sum(len(each) for each in arguments if isinstance(each, str)), str(arguments[0])


class OnTasks:
    """Scores models on tasks; the first model is the teacher. What is in `folder` is not scored again.

    A file of the folder is of one model, task, its documents, and version of lm_eval.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        tokenizer: Any,
        dtype: torch.dtype,
        teacher_digest: str,
        folder: Path,
    ) -> None:
        names = [name for name in str(settings.tasks).split(",") if name]
        self._problems = _problems(settings) if NAME in names else None
        others = ",".join(name for name in names if name != NAME)
        self._tasks = load_tasks(others) if others or not names else {}
        self._tokenizer, self._dtype, self._folder = tokenizer, dtype, folder
        self._identity, self._limit = [teacher_digest, str(dtype)], settings.limit
        self._batch = max(1, settings.batch_tokens // REQUEST_TOKENS)
        self._records: dict[str, dict[str, TaskRecord]] = {}

    def columns(self, label: str, identity: list[Any], model: Callable[[], Any]) -> dict[str, Any]:
        """A model's scores beside the teacher's; `identity` is what it has beyond the teacher's weights."""
        found = {}
        for name, task in self._tasks.items():
            documents = list(itertools.islice(task.eval_docs, self._limit))
            what = [lm_eval.__version__, str(_config_of(task)), str(documents)]

            def ask(name: str = name, task: Any = task) -> TaskRecord:
                asked = LanguageModel(label, model(), self._tokenizer, batch=self._batch, dtype=self._dtype)
                return _record(asked, name, task, self._limit)

            found[name] = self._kept(name, [*identity, *what], ask)
        if (problems := self._problems) is not None:
            found[NAME] = self._kept(
                NAME,
                [*identity, problems],
                lambda: score_humaneval(label, model(), self._tokenizer, problems),
            )
        self._records[label] = found
        tasks, mean = compared(found, next(iter(self._records.values())))
        return {"tasks": tasks, "tasks_mean": mean}

    def comparisons(self) -> list[Comparison]:
        """The student of the best mean against every other one, on the same documents."""
        _, *students = self._records.items()
        strata = {name: _strata(records) for name, records in students}
        if len(strata) < 2 or not all(strata.values()):
            return []
        best = max(strata, key=lambda name: fmean(own.mean() for own, _ in strata[name]))
        found = {
            name: difference([(a - b, ones) for (a, ones), (b, _) in zip(strata[best], each, strict=True)])
            for name, each in strata.items()
            if name != best
        }
        return compared_with("tasks_mean", best, found)

    def _kept(self, name: str, identity: list[Any], ask: Callable[[], TaskRecord]) -> TaskRecord:
        path = self._folder / f"{name}-{fingerprint([*self._identity, *identity])[:16]}.json"
        if path.exists():
            return TaskRecord.from_json(path)
        record = ask()
        self._folder.mkdir(parents=True, exist_ok=True)
        record.write(path)
        return record


def _config_of(task: Any) -> dict[str, Any]:
    """A task's settings without where its files are: these may move, and their documents are known."""
    config = {key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"}
    metadata = config.get("metadata") or {}
    return config | {"metadata": {key: metadata[key] for key in metadata if key != "config_source"}}


def _problems(settings: EvaluateSettings) -> list[Problem]:
    if not settings.run_code:
        raise SettingsError(
            f"--tasks {NAME}, which runs the programs that models write",
            "leave to run them",
            "pass --run-code too, or leave it out",
        )
    return load_problems(settings.limit)


def _record(model: LanguageModel, name: str, task: Any, limit: int | None) -> TaskRecord:
    with _quiet(), torch.inference_mode():
        found: Any = evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    values, higher = found["results"][name], found["higher_is_better"][name]
    kinds = dict(key.split(",", 1) for key in reversed(values) if "," in key and "_stderr," not in key)
    wanted = ("acc", *METRICS) if name in PLAIN_ACCURACY else METRICS
    metric = next((each for each in wanted if each in kinds), next(reversed(kinds)))
    samples = [each for each in found["samples"][name] if each["filter"] == kinds[metric]]
    samples.sort(key=lambda sample: sample["doc_id"])
    value, scores = float(values[f"{metric},{kinds[metric]}"]), [sample[metric] for sample in samples]
    numbers = all(isinstance(score, int | float) for score in scores)
    is_mean = numbers and math.isclose(fmean(map(float, scores)), value, rel_tol=1e-9, abs_tol=1e-12)
    return TaskRecord(
        task=name,
        metric=metric,
        higher_is_better=bool(higher.get(metric, True)),
        value=value,
        documents=len(samples),
        scores=[float(score) for score in scores] if is_mean else [],
        chance=[_chance(task, sample) for sample in samples] if is_mean else [],
    )


def _chance(task: Any, sample: Mapping[str, Any]) -> float:
    """One over the number of answers. A task with `acc_mutual_info` asks for each of them twice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    times = 2 if any(each["metric"] == "acc_mutual_info" for each in task.config.metric_list) else 1
    return times / len(sample["resps"])


def _strata(records: Mapping[str, TaskRecord]) -> list[Stratum]:
    """Of the mean over tasks; empty where a task has no scores by document."""
    better = [record for record in records.values() if record.higher_is_better]
    whole = all(record.scores for record in better)
    return [of_means(record.scores) for record in better] if whole else []


def _intervals(own: list[Stratum], teacher: list[Stratum]) -> dict[str, Interval | None]:
    """Of a value and of what is kept; the same documents are drawn for both."""
    figures, whole = resampled(own), resampled(teacher)
    if figures is None or whole is None:
        return {}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"interval": interval_of(figures), "kept_interval": interval_of(figures / whole)}


def compared(
    records: Mapping[str, TaskRecord], teacher: Mapping[str, TaskRecord]
) -> tuple[dict[str, TaskScore], TaskScore | None]:
    """A model's scores beside its teacher's, and their mean over the tasks of which more is better."""
    scores = {name: _compared(record, teacher[name]) for name, record in records.items()}
    better = [scores[name] for name, record in records.items() if record.higher_is_better]
    if not better:
        return scores, None
    errors = [score.stderr for score in better]
    stderr = None if None in errors else math.hypot(*(error or 0 for error in errors)) / len(errors)
    value, of_teacher, chance = (
        fmean(getattr(score, key) for score in better) for key in ("value", "teacher", "chance")
    )
    mean = TaskScore(
        metric="mean",
        value=value,
        stderr=stderr,
        teacher=of_teacher,
        kept=_fraction(value, of_teacher),
        kept_above_chance=_fraction(value - chance, of_teacher - chance),
        chance=chance,
        documents=sum(score.documents for score in better),
        **_intervals(_strata(records), _strata(teacher)),
    )
    return scores, mean


def _compared(record: TaskRecord, teacher: TaskRecord) -> TaskScore:
    chance = fmean(record.chance) if record.chance else 0.0
    values = (record.value, teacher.value)
    own, whole = values if record.higher_is_better else reversed(values)
    many = len(record.scores) > 1
    return TaskScore(
        metric=record.metric,
        value=record.value,
        stderr=stdev(record.scores) / math.sqrt(record.documents) if many else None,
        teacher=teacher.value,
        kept=_fraction(own, whole),
        kept_above_chance=_fraction(own - chance, whole - chance) if record.higher_is_better else None,
        chance=chance,
        documents=record.documents,
        **(_intervals([of_means(record.scores)], [of_means(teacher.scores)]) if many else {}),
    )


def _fraction(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and notices of lm_eval and of what it loads; lftpipe says what matters."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
