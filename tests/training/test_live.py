"""Training without stored states: the teacher computes them once for all runs of a command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import extracted
from training_runs import assert_same_weights, change, log_of, short_run, teacher_of, weights_of

from lftpipe.base.errors import DivergenceError, SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.train import train
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import EvaluateSettings, TrainSettings
from lftpipe.data.batches import BatchFields
from lftpipe.data.teacher_reader import LiveReader
from lftpipe.store import Store
from lftpipe.teacher.trunk import Trunk

RECIPE = """
[train]
walk_steps = 2
[train.variants.walk]
loss = "fw@0.5/fw,logits:0.1"
[train.variants.straight]
objective = "sfm"
loss_scale = "channel"
[train.variants.along]
objective = "trajectory"
init = "readout"
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teachers, text_folder) -> dict[str, Path]:
    """A store of all states, and one of the same tokens alone."""
    return {
        name: extracted(tmp_path_factory.mktemp(name), teachers["neox"], text_folder, **options)
        for name, options in {"whole": {}, "tokens": {"tokens_only": True}}.items()
    }


def trained(tmp_path: Path, store: Path, **values: Any) -> dict[str, Path]:
    """Every variant of the recipe, trained by one command with the live teacher."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    settings = short_run(store, tmp_path, from_teacher=True, **values)
    given = ("store", "block", "tokens", "batch_tokens", "compute_dtype", "log_every", "from_teacher")
    options = {name: getattr(settings, name) for name in given} | values
    results = train(from_recipe(TrainSettings, path, "train", options))["runs"]
    return {Path(result["run"]).name: Path(result["run"]) for result in results}


@pytest.mark.slow
@pytest.mark.parametrize("hold_back", [{}, {"hold_back": 0.2, "evaluate_every": 4}], ids=["all", "held-back"])
def test_a_store_of_tokens_alone_trains_the_same_weights(tmp_path, stored, hold_back):
    assert not list(stored["tokens"].rglob("hidden*"))
    seed = {"seed": 5 if hold_back else 4}
    whole, alone = (trained(tmp_path, stored[name], **hold_back, **seed) for name in ("whole", "tokens"))
    assert len(whole) == 3
    assert whole.keys() == alone.keys()
    for name, run in whole.items():
        assert_same_weights(run, alone[name])
        assert ("held_back_loss" in log_of(run)[-1]) == bool(hold_back)


def test_the_variants_share_one_pass_of_the_teacher(tmp_path, stored, monkeypatch):
    passes = []
    run = Trunk.run
    monkeypatch.setattr(
        Trunk, "run", lambda self, *given, **named: (passes.append(self), run(self, *given, **named))[1]
    )
    trained(tmp_path, stored["tokens"], seed=6)
    # Twelve steps; before them, what `--init readout` is fitted on, and the channels' variance.
    assert len(passes) == 12 + 12 + 1
    assert len(set(passes)) <= 4  # a trunk is loaded again only if other layers are asked for


@pytest.mark.slow
def test_variants_in_two_processes_are_those_of_one(tmp_path, stored):
    one = trained(tmp_path, stored["tokens"], seed=7)
    weights = {name: weights_of(run) for name, run in one.items()}
    threads = 2 * torch.get_num_threads()
    trained(tmp_path, stored["tokens"], seed=7, workers=2, threads=threads, force=True)
    for name, run in one.items():
        torch.testing.assert_close(weights_of(run), weights[name], rtol=0, atol=0)


@pytest.mark.slow
def test_a_process_that_diverges_ends_the_others_no_sooner(tmp_path, stored):
    path = tmp_path / "recipe.toml"
    path.write_text("[train.variants.wild]\nlearning_rate = 1e30\n[train.variants.tame]\n")
    given = {"store": stored["whole"], "block": "1:3", "tokens": 12 * 4 * 32, "batch_tokens": 4 * 32}
    settings = from_recipe(TrainSettings, path, "train", given | {"compute_dtype": "float32", "seed": 8})
    with pytest.raises(DivergenceError, match="wild"):
        train(change(settings, workers=2, threads=2))
    assert (stored["whole"].parent / "runs/tame-1-3-seed8/manifest.json").exists()


def test_a_run_of_a_store_of_tokens_alone_is_scored_as_one_of_a_whole_store(tmp_path, stored):
    scores = []
    for name in ("whole", "tokens"):
        run = train(short_run(stored[name], tmp_path / name, from_teacher=True))["run"]
        out = tmp_path / f"{name}.json"
        found = evaluate(EvaluateSettings(store=stored[name], runs=(run,), k=(1, 2), out=out))
        scores.append([row[key] for row in found["rows"][1:] for key in ("kl", "nmse", "ppl")])
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)  # one is from states in float16


def test_a_map_of_tokens_alone_is_refused(tmp_path, stored):
    with pytest.raises(SettingsError, match=r"holds tokens alone .* name the block: --block M:N"):
        train(short_run(stored["tokens"], tmp_path, from_teacher=True, block="auto"))


def test_what_is_fitted_from_the_store_is_refused_without_states(tmp_path, stored):
    settings = short_run(stored["tokens"], tmp_path, from_teacher=True, objective="linear")
    with pytest.raises(SettingsError, match=r"block 1:3, which needs state 1 / expected: .* / do:"):
        train(settings)
    with pytest.raises(SettingsError, match=r"block 1:3, which needs state 1 .* --from-teacher"):
        train(short_run(stored["tokens"], tmp_path))


def test_a_teacher_that_is_loaded_deep_enough_is_not_loaded_again(stored, monkeypatch):
    store = Store.open(stored["tokens"])
    teacher, loaded = teacher_of(store), []
    real = Trunk.__init__
    monkeypatch.setattr(Trunk, "__init__", lambda *given: (loaded.append(given[2]), real(*given))[1])
    reader = LiveReader(store, teacher, "cpu")
    wanted = [BatchFields((3,)), BatchFields((0, 1)), BatchFields((2,), (1,)), BatchFields((1, 3))]
    found = [reader.read("train", range(4), fields) for fields in wanted]
    assert loaded == [3]
    for fields, batch in zip(wanted, found, strict=True):
        own = LiveReader(store, teacher, "cpu").read("train", range(4), fields)
        assert batch.states.keys() == set(fields.layers)
        for layer, state in own.states.items():
            torch.testing.assert_close(batch.states[layer], state, rtol=0, atol=0)
        for layer, output in own.attention.items():
            torch.testing.assert_close(batch.attention[layer], output, rtol=0, atol=0)
