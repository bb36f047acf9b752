"""Steps that are chosen token by token: their rows, what they cost, their table."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from evaluations import ROW, trained
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate, summary
from lftpipe.config.settings import EvaluateSettings
from lftpipe.reporting.plots import draw_adaptive
from lftpipe.results.scores import Results
from lftpipe.store import Store


@pytest.fixture(scope="module", params=["neox", "llama"])
def adaptive(request, stores, tmp_path_factory):
    """A flow that was trained enough to turn, evaluated with thresholds from none to all."""
    store, folder = stores[request.param], tmp_path_factory.mktemp("adaptive")
    runs = (
        trained(store, folder / "fw", solver="euler", tokens=64 * CONTEXT),
        trained(store, folder / "regression", objective="regression"),
    )
    settings = EvaluateSettings(
        store=store, runs=runs, k=(1, 4), adaptive=(0.0, 0.3, 1e6), out=folder / "results.json"
    )
    return evaluate(settings)


def test_steps_per_token_lie_between_one_step_and_the_most(adaptive):
    """The laws of the rule are tested in test_adaptive; here, that the rows are made by it."""
    never, some, at_once = adaptive["adaptive"]
    fixed = {row["k"]: row for row in adaptive["rows"] if row["run"] == "fw"}
    metrics = ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl")
    for row, k in ((never, 4), (at_once, 1)):
        assert row["nfe"] == k
        assert {key: row[key] for key in metrics} == pytest.approx({key: fixed[k][key] for key in metrics})
    assert 1 < some["nfe"] < 4
    assert some["kl"] not in (never["kl"], at_once["kl"])
    assert [row["threshold"] for row in adaptive["adaptive"]] == [0.0, 0.3, 1e6]
    assert {row["run"] for row in adaptive["adaptive"]} == {"fw"}, "regression has no steps"
    assert {row["ms_per_token"] for row in adaptive["adaptive"]} == {None}
    assert set(some) == ROW | {"threshold", "nfe_with_keys"}


def test_what_finished_tokens_still_cost_is_counted(adaptive):
    folder = Store.open(Path(adaptive["store"])).identity["teacher"]["model"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.base_model.layers[0]
    total = sum(weight.numel() for weight in layer.parameters())
    if adaptive["teacher"] == "neox":
        keys = layer.attention.query_key_value.weight.numel() * 2 / 3
    else:
        keys = layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel()
    for row in adaptive["adaptive"]:
        assert row["nfe_with_keys"] == pytest.approx(row["nfe"] + keys / total * (4 - row["nfe"]))


def test_steps_per_token_have_a_table_and_a_picture(adaptive, stores, tmp_path):
    table = Path(adaptive["out"]).with_suffix(".md").read_text()
    section = table[table.index("## Steps per token") :].splitlines()
    assert sum(line.startswith("|") for line in section) == 2 + 3 + 2  # heading, thresholds, fixed
    assert summary(adaptive).row_count == len(adaptive["rows"]) + 3
    picture = tmp_path / "adaptive.png"
    read = Results.from_json(Path(adaptive["out"]))
    draw_adaptive(read.rows, read.adaptive or [], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"solver": "midpoint"},
            {},
            r"--adaptive with the midpoint solver of run .* do: pass --solver euler",
        ),
        ({"solver": "euler"}, {"k": (1,)}, r"--adaptive with --k 1 / expected: a k of at least 2"),
        (
            {"objective": "regression"},
            {},
            "--adaptive without a flow / expected: a run of one flow with steps",
        ),
    ],
)
def test_steps_per_token_are_refused_where_there_are_none(stores, tmp_path, changes, options, message):
    run = trained(stores["neox"], tmp_path / "run", **changes)
    out = tmp_path / "results.json"
    with pytest.raises(SettingsError, match=message):
        evaluate(EvaluateSettings(store=stores["neox"], runs=(run,), out=out, adaptive=(0.1,), **options))
    assert not out.exists()
