"""`evaluate --tasks`: scores on lm_eval's tasks, checked against the models' own likelihoods."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from evaluations import row_of, trained
from lm_eval.tasks import TaskManager

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.config.settings import EvaluateSettings
from lftpipe.evaluation import tasks as of_lm_eval
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.teacher.source import open_teacher

#: lm_eval takes more than ten seconds to begin.
pytestmark = pytest.mark.slow

CHOICE = """task: choose
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/choose.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""

LAST = """task: last_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/last.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: text
doc_to_target: word
metric_list:
  - metric: acc
  - metric: perplexity
"""

QUESTIONS = [
    {"text": f"the state of a layer {word}", "choices": ["flows into next", "walk not", "return self def"]}
    for word in ("the", "of", "into", "next", "walk", "self", "def", "not")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [row | {"answer": number % 3} for number, row in enumerate(QUESTIONS)]
    (folder / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": row["text"], "word": "not"} for row in QUESTIONS]
    (folder / "last.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choose.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "last.yaml").write_text(LAST.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def scored(
    teachers: dict[str, Path], text_folder: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateSettings, Any]:
    """A flow of two steps, and a layer without time, on both tasks."""
    store = extracted(tmp_path_factory.mktemp("workspace"), teachers["neox"], text_folder)
    trained(store, store.parent / "runs/fw", solver="midpoint", walk_steps=2)
    trained(store, store.parent / "runs/regression", objective="regression", batch_tokens=2 * CONTEXT)
    settings = EvaluateSettings(store=store, k=(1, 2), skips=(), tasks=str(folder), force=True)
    return settings, evaluate(settings)


def likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    ids, first = tokenizer(f"{context} {answer}")["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.inference_mode():
        nats = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(nats[place - 1, ids[place]].item() for place in range(first, len(ids)))


def accuracy(model: Any, tokenizer: Any) -> float:
    right = 0
    for number, row in enumerate(QUESTIONS):
        nats = [likelihood(model, tokenizer, row["text"], choice) for choice in row["choices"]]
        right += nats.index(max(nats)) == number % 3
    return right / len(QUESTIONS)


def test_the_scores_are_those_of_the_models_themselves(scored, teachers, tokenizer):
    settings, result = scored
    teacher = open_teacher(str(teachers["neox"]), Path("unused"))
    run = runs.open_run(settings.store.parent / "runs/fw")
    expected = [
        accuracy(load_teacher(teacher), tokenizer),
        accuracy(build_student(teacher, [run]), tokenizer),
    ]
    rows = [row_of(result, method="teacher"), row_of(result, run="fw", k=2)]
    assert [row["tasks"]["choose"]["value"] for row in rows] == expected
    assert [row["tasks"]["choose"]["teacher"] for row in rows] == [expected[0]] * 2


def test_a_row_says_what_is_kept_also_above_chance(scored):
    _, result = scored
    row = row_of(result, run="regression")
    chosen, last, mean = row["tasks"]["choose"], row["tasks"]["last_word"], row["tasks_mean"]
    assert (chosen["metric"], last["metric"], chosen["documents"]) == ("acc", "acc", 8)
    assert (chosen["chance"], last["chance"], mean["chance"]) == (
        pytest.approx(1 / 3),
        0,
        pytest.approx(1 / 6),
    )
    for score in (chosen, last, mean):
        own, teacher, chance = (score[key] for key in ("value", "teacher", "chance"))
        assert score["kept"] == (pytest.approx(own / teacher) if teacher else None)
        above = (own - chance) / (teacher - chance) if teacher > chance else None
        assert score["kept_above_chance"] == (pytest.approx(above) if above is not None else None)
    assert mean["value"] == pytest.approx((chosen["value"] + last["value"]) / 2)
    p = chosen["value"]
    assert chosen["stderr"] == pytest.approx((p * (1 - p) / 7) ** 0.5)


def test_teacher_and_students_have_tasks_in_one_number_of_steps(scored):
    _, result = scored
    with_tasks = [(row["run"], row["k"]) for row in result["rows"] if "tasks" in row]
    assert with_tasks == [(None, None), ("fw", 2), ("regression", 1)]


def test_what_was_scored_is_not_scored_again(scored, monkeypatch, tmp_path):
    settings, before = scored

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model ran again")

    kept = sorted((settings.store.parent / "tasks").iterdir())
    assert len(kept) == 6
    asked: list[str] = []
    record = of_lm_eval._record
    monkeypatch.setattr(of_lm_eval, "_record", lambda *given: asked.append(given[1]) or record(*given))
    kept[0].unlink()
    again = evaluate(settings)
    assert asked == [kept[0].name.rpartition("-")[0]]
    monkeypatch.setattr(of_lm_eval, "_record", never)
    once_more = evaluate(settings)
    moved = shutil.copytree(settings.tasks, tmp_path / "moved")
    for file in moved.glob("*.yaml"):
        file.write_text(file.read_text().replace(settings.tasks, str(moved)))
    elsewhere = evaluate(EvaluateSettings(**vars(settings) | {"tasks": str(moved)}))
    for result in (again, once_more, elsewhere):
        assert [row.get("tasks") for row in result["rows"]] == [row.get("tasks") for row in before["rows"]]


def test_the_best_run_is_compared_with_the_others_on_the_same_documents(scored):
    _, result = scored
    by_kl, by_tasks = result["comparisons"]
    rows = {(row["run"], row["k"]): row for row in result["rows"] if row["run"]}
    flow = min((rows["fw", k] for k in (1, 2)), key=lambda row: row["kl"])
    best, other = sorted((flow, rows["regression", 1]), key=lambda row: row["kl"])
    assert (by_kl["measure"], by_kl["run"], by_kl["against"]) == ("kl", best["run"], other["run"])
    assert by_kl["difference"] == pytest.approx(best["kl"] - other["kl"], rel=1e-5)
    means = {run: rows[run, k]["tasks_mean"]["value"] for run, k in (("fw", 2), ("regression", 1))}
    assert by_tasks["measure"] == "tasks_mean"
    assert by_tasks["difference"] == pytest.approx(means[by_tasks["run"]] - means[by_tasks["against"]])
    assert 0 < by_tasks["p"] <= 1
    assert "## Who is ahead" in Path(result["out"]).with_suffix(".md").read_text()


def test_a_limit_counts_documents_and_its_scores_are_others(scored):
    settings, _ = scored
    result = evaluate(EvaluateSettings(**vars(settings) | {"limit": 3, "runs": ("regression",)}))
    assert row_of(result, run="regression")["tasks"]["choose"]["documents"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "no_such_task"}, "--tasks no_such_task, with no task no_such_task / expected: names of"),
        ({"tasks": None, "limit": 3}, "--limit without --tasks / expected: tasks whose documents it counts"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(scored, changes, message, monkeypatch):
    settings, _ = scored
    few = TaskManager(include_defaults=False)  # reading the names of all of lm_eval's tasks takes long
    monkeypatch.setattr(of_lm_eval, "TaskManager", lambda **_: few)
    with pytest.raises(SettingsError, match=message):
        evaluate(EvaluateSettings(**vars(settings) | changes))


def test_without_lm_eval_its_extra_is_named(scored, monkeypatch):
    settings, _ = scored
    monkeypatch.setattr("lftpipe.commands.evaluate.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"do: install it: pip install 'lftpipe\[lm-eval\]'"):
        evaluate(settings)
