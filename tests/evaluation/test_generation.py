"""What models write: continuations and their measures, programs and the process that runs them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted, text_of
from evaluations import row_of, trained

from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.config.settings import EvaluateSettings
from lftpipe.evaluation import continuations, humaneval
from lftpipe.evaluation.continuations import Continuing, common, distinct_2, passages, repetition
from lftpipe.evaluation.humaneval import completion, load_problems, program_of, score_humaneval
from lftpipe.evaluation.sandbox import has_no_network, runs_to_its_end
from lftpipe.store import Store


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 10**6)", True),
        ("import math, re, collections", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("raise SystemExit", False),
        ("x = bytearray(2 * 1024**3)", False),
        ("with open('file', 'w') as file: file.write('x')", False),
        ("import subprocess; subprocess.run(['true'])", False),
        ("import os; os.fork()", False),
        ("import os; assert 'PATH' not in os.environ", True),
        ("import sys; assert sys.stdin.read() == ''", True),
    ],
)
def test_a_program_counts_only_if_it_ends_by_itself_within_its_limits(program: str, ends: bool) -> None:
    assert runs_to_its_end(program) is ends


def test_a_program_without_an_end_is_stopped() -> None:
    assert not runs_to_its_end("while True: pass", seconds=1.0)
    assert not runs_to_its_end("import time; time.sleep(60)", seconds=1.0)


@pytest.mark.skipif(not has_no_network(), reason="this system lets no user take the network away")
def test_a_program_has_no_network() -> None:
    assert not runs_to_its_end("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
    assert runs_to_its_end("import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']")


class Writes:
    """A model that writes one text, whatever it is shown."""

    device = torch.device("cpu")

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)


def test_the_usual_solutions_pass_and_others_do_not() -> None:
    for problem in load_problems(3):
        assert runs_to_its_end(program_of(problem, problem["canonical_solution"]))
        assert not runs_to_its_end(program_of(problem, "    return None"))
    assert len(load_problems(None)) == 164


def test_a_body_ends_where_the_function_is_over(tokenizer: Any) -> None:
    ids = tokenizer("    return 1\n\ndef other():\n    return 2")["input_ids"]
    assert completion(Writes(ids), tokenizer, "def f():\n") == "    return 1\n"
    problem = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    right, wrong = (
        score_humaneval("model", Writes(tokenizer(body)["input_ids"]), tokenizer, [problem])
        for body in ("    return 1\n#", "    return 2\n#")
    )
    assert (right.scores, wrong.scores, right.metric) == ([1.0], [0.0], "pass@1")


def test_measures_of_a_text() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert distinct_2([1, 2, 1, 2, 1]) == 2 / 4
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert (distinct_2([]), repetition([1, 2])) == (1.0, 0.0)


@pytest.fixture(scope="module")
def store(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for seed in range(60):
        (folder / f"{seed}.md").write_text(text_of(seed, 60))
    path = extracted(tmp_path_factory.mktemp("workspace"), teachers["neox"], folder)
    trained(path, path.parent / "runs/regression", objective="regression")
    return path


def test_passages_lie_within_a_document(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "SHOWN", 8)
    monkeypatch.setattr(continuations, "WRITTEN", 8)
    opened = Store.open(store)
    found = list(passages(opened, 5))
    assert len(found) == 5
    rows = list(zip(opened.tokens("validation"), opened.document("validation"), strict=True))
    for passage in found:
        assert any(
            row[start : start + 16].tolist() == passage and len(set(document[start : start + 16])) == 1
            for row, document in rows
            for start in range(CONTEXT - 15)
        )


def test_rows_say_how_continuations_agree(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "SHOWN", 8)
    monkeypatch.setattr(continuations, "WRITTEN", 8)
    result = evaluate(EvaluateSettings(store=store, skips=(), continuations=5, force=True))
    teacher = row_of(result, method="teacher")["continuations"]
    student = row_of(result, run="regression")["continuations"]
    assert teacher["passages"] == student["passages"] == 5
    assert 1 < teacher["as_teacher"] <= 8
    assert student["as_teacher"] <= teacher["as_teacher"]
    assert "## Continuations" in Path(result["out"]).with_suffix(".md").read_text()


def test_the_measures_of_a_model_that_writes_the_text_itself(store: Path, tokenizer: Any) -> None:
    short = SimpleNamespace(eos_token_id=0)
    with pytest.raises(SettingsError, match="--continuations with validation documents shorter than 128"):
        Continuing(Store.open(store), short, 5)


def test_code_runs_only_where_it_is_allowed(store: Path) -> None:
    with pytest.raises(SettingsError, match=r"--tasks humaneval, which runs the programs .* pass --run-code"):
        evaluate(EvaluateSettings(store=store, tasks="humaneval", force=True))


def test_humaneval_is_a_task_like_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "MOST_TOKENS", 4)
    settings = EvaluateSettings(store=store, skips=(), tasks="humaneval", run_code=True, limit=2, force=True)
    score = row_of(evaluate(settings), run="regression")["tasks"]["humaneval"]
    assert (score["metric"], score["documents"], score["chance"]) == ("pass@1", 2, 0)
    assert len(list((store.parent / "tasks").glob("humaneval-*.json"))) == 2
