import json
import math
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from evaluations import ROW, row_of, trained
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.commands.evaluate import evaluate, summary
from lftpipe.config.settings import EvaluateSettings
from lftpipe.corpus.packing import positions
from lftpipe.evaluation.metrics import LogitMetrics, NextTokens, Reference
from lftpipe.store import Store


@pytest.fixture(scope="module", params=["neox", "llama"])
def result(request, stores, tmp_path_factory):
    """Three runs of a float16 store, evaluated in batches that do not divide the split."""
    store, folder = stores[request.param], tmp_path_factory.mktemp("runs")
    runs = (
        trained(store, folder / "fw", solver="midpoint", walk_steps=2),
        trained(store, folder / "euler", solver="euler", seed=3),
        trained(store, folder / "regression", objective="regression"),
        trained(store, folder / "linear", objective="linear"),
        trained(store, folder / "identity", objective="regression", block="0:1", learning_rate=0.0),
    )
    settings = EvaluateSettings(
        store=store, runs=runs, k=(1, 3), skips=(1, 4), batch_tokens=3 * CONTEXT, out=folder / "results.json"
    )
    return evaluate(settings)


def test_every_row_has_the_fields_of_the_contract(result):
    for row in result["rows"]:
        assert set(row) == ROW
        assert row["ppl"] > 1
        assert math.isfinite(row["ppl"])
        assert row["ms_per_token"] > 0
        assert math.isfinite(row["ms_per_token"])
    assert result["validation_tokens"] == 7 * CONTEXT


def test_the_rows_are_those_of_table_1(result):
    names = [(row["method"], row["block"], row["solver"], row["k"], row["nfe"]) for row in result["rows"]]
    assert names == [
        ("teacher", None, None, None, None),
        ("skip layer 0", "0:1", None, None, 0),
        ("skip layers 0-3", "0:4", None, None, 0),
        ("skip layer 1", "1:2", None, None, 0),
        ("skip layers 1-2", "1:3", None, None, 0),
        ("fw", "1:3", "midpoint", 1, 2),
        ("fw", "1:3", "midpoint", 3, 6),
        ("fw", "1:3", "euler", 1, 1),
        ("fw", "1:3", "euler", 3, 3),
        ("regression", "1:3", "euler", 1, 1),
        ("linear", "1:3", "euler", 1, 1),
        ("regression", "0:1", "euler", 1, 1),
    ]
    assert [row["seed"] for row in result["rows"] if row["run"] == "euler"] == [3, 3]
    assert {row["train_tokens"] for row in result["rows"] if row["method"] == "fw"} == {4 * CONTEXT}


def test_what_has_no_meaning_is_null(result):
    teacher = row_of(result, method="teacher")
    given = {key for key, value in teacher.items() if value is not None}
    assert given == {"method", "ppl", "parameters", "layers", "bytes", "ms_per_token"}
    skip = row_of(result, method="skip layer 1")
    absent = {key for key, value in skip.items() if value is None}
    assert absent == {"objective", "solver", "k", "run", "seed", "train_tokens", "weights_digest"}


def test_a_perfect_prediction_has_no_divergence_and_the_teachers_perplexity(result):
    """The untrained regression layer of block 0:1 is the teacher's layer 0 itself."""
    perfect, teacher = row_of(result, run="identity"), row_of(result, method="teacher")
    # The cached target is rounded to float16; the prediction starts from a rounded state too.
    assert perfect["nmse"] < 1e-5
    assert perfect["nmse_without_first"] < 1e-5
    assert perfect["kl"] < 1e-4
    assert perfect["kl_latent"] < 1e-4
    assert perfect["ppl"] == pytest.approx(teacher["ppl"], rel=1e-3)
    assert perfect["parameters"] == teacher["parameters"]
    assert perfect["agreement"] == 1
    assert perfect["ppl_ratio"] == pytest.approx(1, rel=1e-3)


def test_the_teachers_perplexity_is_that_of_the_whole_model_run_on_each_segment(result):
    store = Store.open(Path(result["store"]))
    folder = store.identity["teacher"]["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    places = torch.from_numpy(positions(store.document("validation"))).long()
    tokens = torch.from_numpy(store.tokens("validation")).long()
    with torch.no_grad():
        logits = model(tokens, position_ids=places, use_cache=False).logits
    metrics = LogitMetrics()
    flat = logits.flatten(0, 1)
    metrics.add(flat, Reference.of(flat), NextTokens.of(tokens, places == 0))
    assert row_of(result, method="teacher")["ppl"] == pytest.approx(metrics.perplexity, rel=1e-3)


def test_skipping_is_the_model_without_those_layers(result):
    store = Store.open(Path(result["store"]))
    folder = store.identity["teacher"]["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.base_model.layers = torch.nn.ModuleList([model.base_model.layers[i] for i in (0, 3)])
    model.config.num_hidden_layers = 2
    places = torch.from_numpy(positions(store.document("validation"))).long()
    tokens = torch.from_numpy(store.tokens("validation")).long()
    with torch.no_grad():
        logits = model(tokens, position_ids=places, use_cache=False).logits
    metrics = LogitMetrics()
    flat = logits.flatten(0, 1)
    metrics.add(flat, Reference.of(flat), NextTokens.of(tokens, places == 0))
    skip = row_of(result, method="skip layers 1-2")
    assert skip["ppl"] == pytest.approx(metrics.perplexity, rel=1e-3)
    assert skip["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    x_0, x_1 = (torch.from_numpy(store.read("validation", layer, range(7))).float() for layer in (1, 3))
    assert skip["nmse"] == pytest.approx(((x_0 - x_1).square().sum() / x_1.square().sum()).item(), rel=1e-4)


def test_results_are_written_as_json_and_as_a_table(result):
    out = Path(result["out"])
    written = json.loads(out.read_text())
    assert written.pop("digest")
    assert written == {key: value for key, value in result.items() if key != "out"}
    lines = out.with_suffix(".md").read_text().partition("## ")[0].splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(result["rows"])
    assert summary(result).row_count == len(result["rows"])


def test_the_batch_does_not_matter(stores, tmp_path):
    run = trained(stores["neox"], tmp_path / "run")
    rows = []
    for batch in (CONTEXT, 100 * CONTEXT):
        out = tmp_path / f"{batch}.json"
        settings = EvaluateSettings(store=stores["neox"], runs=(run,), k=(2,), batch_tokens=batch, out=out)
        rows.append(evaluate(settings)["rows"])
    for one, other in zip(*rows, strict=True):
        for key in ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl"):
            assert (one[key] is None) == (other[key] is None)
            if one[key] is not None:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7)


def test_left_out_every_finished_run_beside_the_store_is_scored(teachers, text_folder, tmp_path):
    store = extracted(tmp_path, teachers["neox"], text_folder)
    with pytest.raises(
        RunError, match=r"no finished run in .*runs / expected: at least one / do: make one with"
    ):
        evaluate(EvaluateSettings(store=store))
    for seed in (0, 1):
        trained(store, store.parent / f"runs/seed{seed}", seed=seed)
    result = evaluate(EvaluateSettings(workspace=tmp_path, k=(1,)))
    assert [row["run"] for row in result["rows"] if row["run"]] == ["seed0", "seed1"]
    assert Path(result["out"]) == store.parent / "results.json"
    with pytest.raises(
        SettingsError, match=r"results\.json, which exists / .* / do: pass --force or another --out"
    ):
        evaluate(EvaluateSettings(workspace=tmp_path, runs=("seed1",), k=(1,)))
    only = evaluate(EvaluateSettings(workspace=tmp_path, runs=("seed1",), k=(1,), force=True))
    assert [row["run"] for row in only["rows"] if row["run"]] == ["seed1"]
    with pytest.raises(RunError, match=r"missing run .*seed7 / expected: a finished run with manifest\.json"):
        evaluate(EvaluateSettings(workspace=tmp_path, runs=("seed7",), force=True))
    (store.parent / "runs/seed1/manifest.json").unlink()
    with pytest.raises(
        RunError, match=r"unfinished run .*seed1 / .* do: train it with `lftpipe train --resume`"
    ):
        evaluate(EvaluateSettings(workspace=tmp_path, runs=("seed1",), force=True))


def test_a_run_of_another_store_is_refused(stores, teachers, text_folder, tmp_path):
    run = trained(stores["neox"], tmp_path / "run")
    other = extracted(tmp_path, teachers["neox"], text_folder, dtype="float32")
    with pytest.raises(
        RunError, match=r"run, trained from another store than .* / expected: runs of this store"
    ):
        evaluate(EvaluateSettings(store=other, runs=(run,)))
    assert not (other.parent / "results.json").exists()


def test_a_run_is_still_its_stores_when_that_has_grown(teachers, text_folder, tmp_path):
    store = extracted(tmp_path, teachers["neox"], text_folder, tokens=24 * CONTEXT)
    run = trained(store, tmp_path / "run")
    before = evaluate(EvaluateSettings(store=store, runs=(run,), k=(1,), out=tmp_path / "before.json"))
    extracted(tmp_path, teachers["neox"], text_folder, tokens=48 * CONTEXT)
    after = evaluate(EvaluateSettings(store=store, runs=(run,), k=(1,), out=tmp_path / "after.json"))
    assert after["store_fingerprint"] != before["store_fingerprint"]
    assert row_of(after, run="run")["kl"] == row_of(before, run="run")["kl"]


def test_a_store_with_nothing_held_out_cannot_be_evaluated_on(teachers, text_folder, tmp_path):
    store = extracted(tmp_path, teachers["neox"], text_folder, validation_tokens=0)
    with pytest.raises(
        StoreError, match=r"without validation sequences .* / do: extract with --validation-tokens"
    ):
        evaluate(EvaluateSettings(store=store))


def test_the_table_never_takes_the_place_of_the_numbers(stores):
    with pytest.raises(SettingsError, match=r"--out results\.md / expected: the JSON file's name"):
        evaluate(EvaluateSettings(store=stores["neox"], out=Path("results.md")))


def test_a_store_of_the_blocks_ends_alone_is_enough(teachers, text_folder, tmp_path):
    store = extracted(tmp_path, teachers["neox"], text_folder, layers="1,3", attention=False)
    run = trained(store, tmp_path / "run")
    result = evaluate(EvaluateSettings(store=store, runs=(run,), k=(1,), skips=(1,)))
    skip = row_of(result, method="skip layer 1")  # its end, h[2], is not stored
    assert (skip["nmse"], skip["kl_latent"]) == (None, None)
    assert skip["ppl"] > 1
    assert skip["kl"] > 0


def test_another_solver_than_that_of_training(stores, tmp_path):
    runs = (
        trained(stores["neox"], tmp_path / "fw", solver="midpoint"),
        trained(stores["neox"], tmp_path / "euler", solver="euler"),
        trained(stores["neox"], tmp_path / "regression", objective="regression"),
    )
    rows = {}
    for solver in (None, "euler", "midpoint"):
        settings = EvaluateSettings(
            store=stores["neox"], runs=runs, k=(2,), solver=solver, out=tmp_path / f"{solver}.json"
        )
        rows[solver] = {row["run"]: row for row in evaluate(settings)["rows"] if row["run"]}
    for solver, nfe in (("euler", 2), ("midpoint", 4)):
        assert {
            (row["solver"], row["nfe"]) for name, row in rows[solver].items() if name != "regression"
        } == {(solver, nfe)}
    # A run without time has one evaluation, whatever the solver.
    assert {rows[solver]["regression"]["nfe"] for solver in rows} == {1}
    assert rows["euler"]["euler"]["kl"] == rows[None]["euler"]["kl"] != rows["midpoint"]["euler"]["kl"]
    assert rows["midpoint"]["fw"]["kl"] == rows[None]["fw"]["kl"] != rows["euler"]["fw"]["kl"]
