"""Several flow layers in one student: evaluated together, as the exported student of both."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT
from tiny_students import tokens

import lftpipe
from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.generate import generate
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, GenerateSettings, TrainSettings
from lftpipe.reporting.runs import scores_of
from lftpipe.store import Store


@pytest.fixture(scope="module", params=["neox", "llama"])
def trained(request, stores, tmp_path_factory) -> tuple[Path, list[str]]:
    """A store, and runs of blocks 0:1 and 2:3, with a layer of the teacher between them."""
    store = stores[request.param]
    settings = TrainSettings(
        store=store,
        block="0:1,2:3",
        joint=True,
        solver="euler",
        walk_steps=2,
        tokens=20 * 4 * CONTEXT,
        batch_tokens=4 * CONTEXT,
        compute_dtype="float32",
        condition="source",
        run=str(tmp_path_factory.mktemp("together") / "run"),
    )
    return store, [result["run"] for result in train(settings)["runs"]]


def test_together_is_the_exported_students_divergence(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    store, runs = trained
    backwards = tuple(reversed(runs))
    result = evaluate(
        EvaluateSettings(store=store, runs=backwards, together=True, k=(1, 2), out=tmp_path / "r.json")
    )
    rows = [row for row in result["rows"] if row["block"] == "0:1,2:3"]
    assert [(row["k"], row["nfe"], row["method"]) for row in rows] == [(1, 2, "fw + fw"), (2, 4, "fw + fw")]
    exported = export(ExportSettings(store=store, runs=tuple(runs), k=2, out=tmp_path / "student"))
    model = AutoModelForCausalLM.from_pretrained(exported["out"]).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == rows[1]["parameters"]
    opened = Store.open(store)
    stored, document = opened.tokens("validation"), opened.document("validation")
    nats, count = 0.0, 0
    for ids, places in zip(stored, document, strict=True):
        for number in dict.fromkeys(places.tolist()):
            segment = torch.from_numpy(ids[places == number]).long()[None]
            if segment.shape[1] > 1:
                with torch.no_grad():
                    log = model(segment).logits[0, :-1].log_softmax(-1)
                nats -= log.gather(-1, segment[0, 1:, None]).sum().item()
                count += segment.shape[1] - 1
    perplexity = torch.tensor(nats / count).exp().item()
    assert perplexity == pytest.approx(rows[1]["ppl"], rel=1e-3)


def test_runs_that_were_trained_jointly_are_scored_as_the_one_student_they_are(trained, tmp_path):
    store, runs = trained

    def rows(*named: str, **more: Any) -> dict[str | None, float]:
        given = EvaluateSettings(store=store, runs=named, k=(2,), out=tmp_path / "r.json", force=True, **more)
        return {row["block"]: row["kl"] for row in evaluate(given)["rows"] if row["run"]}

    joint, together = rows(*runs), rows(*runs, together=True)
    assert list(joint) == ["0:1,2:3"]
    assert list(together) == ["0:1", "2:3", "0:1,2:3"]
    assert joint["0:1,2:3"] == together["0:1,2:3"]
    assert rows(runs[1]) == joint  # each stands for the student


def test_where_the_others_are_gone_a_run_is_a_student_by_itself(trained, tmp_path):
    store, runs = trained
    alone = shutil.copytree(runs[1], tmp_path / Path(runs[1]).name)
    given = EvaluateSettings(store=store, runs=(str(alone),), k=(2,), out=tmp_path / "r.json")
    assert [row["block"] for row in evaluate(given)["rows"] if row["run"]] == ["2:3"]


@pytest.mark.parametrize("name", [0, 1])
def test_every_command_takes_any_run_of_a_joint_student_for_the_whole(trained, tmp_path, name):
    store, runs = trained
    whole = export(ExportSettings(store=store, runs=tuple(runs), out=tmp_path / "whole"))
    one = export(ExportSettings(store=store, runs=(runs[name],), out=tmp_path / "one"))
    assert one["runs"] == whole["runs"] == runs
    assert one["blocks"] == ["0:1", "2:3"]
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("whole", "one")]
    assert files[0] == files[1]
    loaded, exported = lftpipe.load_student(runs[name]), lftpipe.load_student(tmp_path / "one")
    ids = tokens(16)
    for student in (
        loaded,
        exported,
    ):  # weights lie as in their files, and the alignment decides the last bits
        for parameter in student.parameters():
            parameter.data = parameter.data.clone()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, exported(ids).logits)
    given = GenerateSettings(store=store, target=runs[name], prompt="a", max_new_tokens=2)
    written = generate(given)
    assert (written["model"], written["nfe"]) == (runs[name], 4)
    drafted = generate(replace(given, target=None, draft=runs[name]))
    assert drafted["equals_teacher"]


def test_a_run_that_was_trained_jointly_has_the_scores_of_its_student(trained):
    store, runs = trained
    beside = Path(runs[0]).resolve().parent.parent / "results.json"
    evaluate(EvaluateSettings(store=store, runs=tuple(runs), k=(2,), out=beside, force=True))
    assert [[row.block for row in scores_of(Path(run))] for run in runs] == [["0:1,2:3"]] * 2


def test_one_run_or_blocks_that_overlap_are_not_together(trained, tmp_path):
    store, runs = trained
    alone = str(tmp_path / "alone")
    train(TrainSettings(store=store, block="0:1", objective="skip", run=alone))
    with pytest.raises(SettingsError, match=r"--together with one run / expected: several"):
        evaluate(EvaluateSettings(store=store, runs=(alone,), together=True, out=tmp_path / "r.json"))
    with pytest.raises(SettingsError, match=r"blocks 0:1, 0:1, 2:3 / expected: blocks in order that"):
        evaluate(EvaluateSettings(store=store, runs=(runs[0], alone), together=True, out=tmp_path / "r.json"))
