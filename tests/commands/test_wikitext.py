"""`evaluate --corpus wikitext-2`: the perplexity of a whole text is that which lm_eval finds for it."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import extracted, text_of
from evaluations import row_of, trained
from lm_eval.evaluator import evaluate as ask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lftpipe import runs
from lftpipe.base.errors import CorpusError
from lftpipe.commands.evaluate import evaluate, summary
from lftpipe.config.settings import EvaluateSettings
from lftpipe.corpus.wikitext import read_wikitext
from lftpipe.evaluation.whole_text import WholeText
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.teacher.source import open_teacher

TASK = """task: whole
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""

#: The tiny teacher's context; lm_eval predicts a token for each that it shows, and we one less.
CONTEXT = 128


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Lines whose tokens fill whole windows: of the last one, lm_eval would show more than its own."""
    file = tmp_path_factory.mktemp("wikitext") / "wiki.test.raw"
    words = text_of(7, 400).split()
    for count in range(260, 400):
        lines = [" \n", " = Title = \n", " \n", " ".join(words[:count]) + "\n", "end"]
        file.write_text("".join(lines))
        if len(tokenizer(read_wikitext(file))["input_ids"]) % (CONTEXT - 1) == 0:
            return file
    raise AssertionError("no number of words fills the windows")


@pytest.fixture(scope="module")
def scored(teachers, text_folder, file, tmp_path_factory) -> tuple[EvaluateSettings, Any]:
    store = extracted(tmp_path_factory.mktemp("workspace"), teachers["neox"], text_folder, layers="1,3")
    trained(store, store.parent / "runs/flow", solver="midpoint", walk_steps=2)
    settings = EvaluateSettings(
        store=store, k=(2,), skips=(), corpus=f"wikitext-2={file}", batch_tokens=3 * CONTEXT, force=True
    )
    return settings, evaluate(settings)


def test_the_lines_of_a_file_are_joined_as_the_fields_tables_have_them(file):
    text = read_wikitext(file)
    assert text.startswith("\n\n = Title = \n\n\n\n\n")
    assert text.endswith("\n\n\nend")


def test_the_perplexity_by_word_is_lm_evals_for_teacher_and_student(
    scored, file, teachers, tokenizer, tmp_path
):
    settings, result = scored
    text = read_wikitext(file)
    (tmp_path / "whole.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "whole.yaml").write_text(TASK.format(data=tmp_path / "whole.jsonl"))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    teacher = open_teacher(str(teachers["neox"]), Path("unused"))
    run = runs.open_run(settings.store.parent / "runs/flow")
    models = [load_teacher(teacher), build_student(teacher, [run])]
    rows = [row_of(result, method="teacher"), row_of(result, run="flow")]
    its_words = len(re.split(r"\s+", text))  # an empty one at the front among them
    for model, row in zip(models, rows, strict=True):
        asked: Any = HFLM  # its decorator hides its type
        lm = asked(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT - 1, batch_size=2)
        found: Any = ask(lm, {"tasks": manager.load(["whole"])["tasks"]}, bootstrap_iters=0)
        word_perplexity = found["results"]["whole"]["word_perplexity,none"]
        nats = its_words * math.log(word_perplexity)
        assert row["word_ppl"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)
        assert row["ppl"] == pytest.approx(math.exp(nats / result["validation_tokens"]), rel=1e-5)


def test_every_token_is_predicted_once_and_a_rest_is_not_dropped(teachers, tokenizer):
    teacher = open_teacher(str(teachers["neox"]), Path("unused"))
    text = text_of(3, 200)
    whole = WholeText(text, teacher, "cpu", torch.float32, 2 * CONTEXT)
    rows = [row for batch in whole._rows() for row in batch]
    assert [token for row in rows for token in row[1:]] == tokenizer(text)["input_ids"]
    assert all(later[0] == row[-1] for row, later in itertools.pairwise(rows))
    assert {len(row) for row in rows[:-1]} == {CONTEXT}
    assert 1 < len(rows[-1]) < CONTEXT
    assert rows[0][0] == tokenizer.eos_token_id
    assert whole.num_tokens == len(tokenizer(text)["input_ids"])


def test_results_have_a_name_and_a_column_of_their_own(scored):
    _, result = scored
    out = Path(result["out"])
    assert out.name == "results-wikitext-2.json"
    assert "| word PPL |" in out.with_suffix(".md").read_text()
    assert "word" in [column.heading for column in summary(result).columns]
    flow = row_of(result, run="flow")
    assert flow["ppl_ratio"] == pytest.approx(flow["ppl"] / row_of(result, method="teacher")["ppl"])
    assert flow["kl"] > 0


def test_a_file_that_is_not_there_is_refused(scored):
    settings, _ = scored
    with pytest.raises(CorpusError, match=r"wikitext-2=/nowhere .* / do: name the file"):
        evaluate(EvaluateSettings(**vars(settings) | {"corpus": "wikitext-2=/nowhere"}))
