"""Several flow layers in one student: evaluated together, as the exported student of both."""

from dataclasses import replace
from pathlib import Path

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
from lftpipe.store import Store


@pytest.fixture(scope="module", params=["neox", "llama"])
def trained(request, stores, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A store, and students of blocks 0:1 and 2:3: of two runs, and of one."""
    store, folder = stores[request.param], tmp_path_factory.mktemp("together")
    settings = TrainSettings(
        store=store,
        block="0:1,2:3",
        solver="euler",
        walk_steps=2,
        tokens=20 * 4 * CONTEXT,
        batch_tokens=4 * CONTEXT,
        compute_dtype="float32",
        condition="source",
    )
    made = {
        name: train(replace(settings, joint=name == "joint", run=str(folder / name))).runs
        for name in ("apart", "joint")
    }
    return store, {name: [result.run for result in results] for name, results in made.items()}


@pytest.mark.parametrize("name", ["apart", "joint"])
def test_together_is_the_exported_students_divergence(trained, tmp_path, name):
    from transformers import AutoModelForCausalLM

    store, runs = trained[0], trained[1][name]
    apart = name == "apart"
    backwards = tuple(reversed(runs))
    given = {"store": store, "runs": backwards, "together": apart, "k": (1, 2)}
    result = evaluate(EvaluateSettings(**given, out=tmp_path / "r.json"))
    rows = [row for row in result["rows"] if row["block"] == "0:1,2:3"]
    method = "fw + fw" if apart else "fw"
    assert [(row["k"], row["nfe"], row["method"]) for row in rows] == [(1, 2, method), (2, 4, method)]
    assert {(row["shape"], row["layers"]) for row in rows} == {("0:1>flow, 2:3>flow", 4)}
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


def test_every_command_takes_a_run_of_several_parts(trained, tmp_path):
    store, (run,) = trained[0], trained[1]["joint"]
    one = export(ExportSettings(store=store, runs=(run,), out=tmp_path / "one"))
    assert (one["blocks"], one["shape"]) == (["0:1", "2:3"], "0:1>flow, 2:3>flow")
    loaded, exported = lftpipe.load_student(run), lftpipe.load_student(tmp_path / "one")
    ids = tokens(16)
    for student in (
        loaded,
        exported,
    ):  # weights lie as in their files, and the alignment decides the last bits
        for parameter in student.parameters():
            parameter.data = parameter.data.clone()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, exported(ids).logits)
    given = GenerateSettings(store=store, target=run, prompt="a", max_new_tokens=2)
    written = generate(given)
    assert (written["model"], written["nfe"]) == (run, 4)
    drafted = generate(replace(given, target=None, draft=run))
    assert drafted["equals_teacher"]


def test_one_run_or_blocks_that_overlap_are_not_together(trained, tmp_path):
    store, (whole,) = trained[0], trained[1]["joint"]
    alone = str(tmp_path / "alone")
    train(TrainSettings(store=store, block="0:1", objective="skip", run=alone))
    with pytest.raises(SettingsError, match=r"--together with one run / expected: several"):
        evaluate(EvaluateSettings(store=store, runs=(alone,), together=True, out=tmp_path / "r.json"))
    with pytest.raises(SettingsError, match=r"blocks 0:1, 0:3 / expected: blocks in order that"):
        evaluate(EvaluateSettings(store=store, runs=(whole, alone), together=True, out=tmp_path / "r.json"))
