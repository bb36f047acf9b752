"""The loop: a run ends the same however it got there, and its folder holds what the contract says."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from training_runs import change, log_of, short_run, stop_before, weights_of

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.commands.train import summary, train
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.flow.velocity import Velocity

OBJECTIVES = ("fw", "sfm", "hybrid", "regression", "trajectory")


def twelve_steps(stores: dict[str, Path], folder: Path) -> TrainSettings:
    return short_run(stores["neox"], folder, solver="midpoint", walk_steps=2)


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    """Twelve steps on block 1:3, into a folder of the test's own."""
    return twelve_steps(stores, tmp_path)


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory) -> dict[str, TrainSettings]:
    """The same twelve steps, done: for two objectives."""
    made = {}
    for objective in ("fw", "regression"):
        folder = tmp_path_factory.mktemp(objective)
        made[objective] = change(twelve_steps(stores, folder), objective=objective)
        train(made[objective])
    return made


@pytest.mark.parametrize(
    ("family", "objective"), [*(("neox", objective) for objective in OBJECTIVES), ("llama", "fw")]
)
def test_the_loss_goes_down(settings, stores, family, objective):
    more = {"tokens": 36 * 4 * CONTEXT, "learning_rate": 8e-3}
    result = train(change(settings, store=stores[family], objective=objective, **more))
    losses = [row["loss"] for row in log_of(result["run"])]
    assert len(losses) == 36
    assert sum(losses[-9:]) < 0.8 * sum(losses[:9])


def test_a_run_holds_what_the_contract_says(settings):
    result = train(settings)
    run = Path(result["run"])
    assert {path.name for path in run.iterdir()} == {
        "settings.toml",
        "metrics.jsonl",
        "flow.safetensors",
        "manifest.json",
    }
    rows = log_of(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert list(rows[0]) == [
        "step",
        "tokens",
        "loss",
        "nmse",
        "learning_rate",
        "seconds",
        "data_wait_seconds",
    ]
    assert rows[-1]["tokens"] == result["train_tokens"] == settings.tokens
    manifest = json.loads((run / "manifest.json").read_text())
    keys = {"store_fingerprint", "block", "objective", "solver", "seed", "versions", "weights_digest"}
    assert keys <= manifest.keys()
    assert (manifest["block"], manifest["objective"], manifest["solver"]) == ([1, 3], "fw", "midpoint")
    opened = runs.open_run(run)
    assert (opened.block, opened.has_time, opened.train_tokens) == ((1, 3), True, settings.tokens)
    assert f"next: lftpipe evaluate {run} --store {settings.store}" in summary(result)


def test_the_settings_of_a_run_are_a_recipe_that_makes_it_again(trained, tmp_path):
    settings = trained["fw"]
    recipe = Path(str(settings.run)) / "settings.toml"
    again = from_recipe(TrainSettings, recipe, "train", {"run": str(tmp_path / "again")})
    assert again.threads == torch.get_num_threads()  # what was left out is recorded as it was settled
    left_out = {"run": settings.run, "threads": settings.threads, "learning_rate": None, "muon_dtype": "auto"}
    assert change(again, **left_out) == settings
    train(again)
    torch.testing.assert_close(weights_of(tmp_path / "again"), weights_of(settings.run), rtol=0, atol=0)
    assert tomllib.loads(recipe.read_text())["store"]["fingerprint"]


@pytest.mark.parametrize(("objective", "killed"), [("fw", 3), ("fw", 8), ("fw", 11), ("regression", 8)])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(trained, tmp_path, monkeypatch, objective, killed):
    unbroken = trained[objective]
    broken = change(unbroken, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, killed)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    with (tmp_path / "broken/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 12, "lo')  # a line cut short
    with pytest.raises(RunError, match=r"unfinished run .* / do: pass --resume, or --force to restart"):
        train(broken)
    train(change(broken, resume=True))
    torch.testing.assert_close(weights_of(broken.run), weights_of(unbroken.run), rtol=0, atol=0)
    same = ("step", "tokens", "loss", "nmse", "learning_rate")
    rows = [[{key: row[key] for key in same} for row in log_of(run)] for run in (broken.run, unbroken.run)]
    assert rows[0] == rows[1]


def test_another_seed_gives_other_weights(trained, tmp_path):
    train(change(trained["fw"], seed=1, run=str(tmp_path / "other")))
    ours, theirs = weights_of(trained["fw"].run), weights_of(tmp_path / "other")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("dtype", "objective"), [("float32", "fw"), ("float16", "trajectory")])
def test_the_live_teacher_gives_the_caches_losses(
    teachers, text_folder, tmp_path, settings, dtype, objective
):
    store = extracted(tmp_path, teachers["neox"], text_folder, dtype=dtype)
    base = change(settings, store=store, objective=objective, learning_rate=1e-4)
    losses = []
    for live in (False, True):
        run = str(tmp_path / f"live-{live}")
        train(change(base, from_teacher=live, run=run))
        losses.append([row["loss"] for row in log_of(run)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == "float32" else 1e-2)


def test_training_from_the_live_teacher_needs_no_stored_states_of_the_block(
    teachers, text_folder, tmp_path, settings
):
    store = extracted(tmp_path, teachers["neox"], text_folder, layers="0,4")
    with pytest.raises(
        SettingsError, match=r"block 1:3, which needs state 1 / expected: states .*: 0, 4 / do: choose"
    ):
        train(change(settings, store=store))
    assert train(change(settings, store=store, from_teacher=True))["steps"] == 12


def test_a_clip_of_0_clips_nothing(settings, tmp_path):
    train(change(settings, clip=0.0))
    train(change(settings, clip=1e9, run=str(tmp_path / "wide")))
    torch.testing.assert_close(weights_of(settings.run), weights_of(tmp_path / "wide"), rtol=0, atol=0)


def test_the_matrices_are_muons_and_the_rest_adamws(settings, tmp_path):
    """After one step on the same gradients, only what Muon moves differs from AdamW alone."""
    one = change(settings, tokens=settings.batch_tokens, learning_rate=1e-3)
    train(change(one, optimizer="muon"))
    train(change(one, optimizer="adamw", run=str(tmp_path / "adamw")))
    ours, theirs = weights_of(settings.run), weights_of(tmp_path / "adamw")
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differ == {name for name in ours if ours[name].ndim == 2 and not name.startswith("modulation.")}


def test_a_teachers_dropout_does_not_make_training_random(teachers, text_folder, tmp_path, settings):
    folder = tmp_path / "dropout"
    shutil.copytree(teachers["neox"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"attention_dropout": 0.5, "hidden_dropout": 0.5})
    )
    losses = []
    for model in (folder, teachers["neox"]):
        store = extracted(tmp_path, model, text_folder)
        train(change(settings, store=store, run=str(tmp_path / f"run-{model.name}")))
        losses.append([row["loss"] for row in log_of(tmp_path / f"run-{model.name}")])
    assert losses[0] == losses[1]


def test_left_out_the_run_is_named_after_block_objective_and_seed(teachers, text_folder, tmp_path, settings):
    store = extracted(tmp_path, teachers["neox"], text_folder)
    for changes, name in (
        ({}, "1-3-fw2-seed0"),
        ({"solver": "euler", "seed": 3}, "1-3-fw2-euler-seed3"),
        ({"objective": "sfm"}, "1-3-sfm-seed0"),
        ({"objective": "linear"}, "1-3-linear-seed0"),
        ({"run": "mine"}, "mine"),
    ):
        result = train(change(settings, **{"store": store, "run": None, **changes}))
        assert Path(result["run"]) == store.parent / "runs" / name


def test_the_linear_map_is_a_finished_run(settings):
    result = train(change(settings, objective="linear", tokens=10**6))
    run = runs.open_run(Path(result["run"]))
    assert (run.has_time, run.solver, run.walk_steps) == (False, "euler", 1)
    assert run.train_tokens == 48 * CONTEXT  # the whole split, once


@pytest.mark.parametrize(
    ("objective", "evaluations"), [("regression", 1), ("sfm", 1), ("fw", 4), ("hybrid", 5), ("trajectory", 1)]
)
def test_a_step_evaluates_the_velocity_no_more_often_than_its_objective_says(
    settings, monkeypatch, objective, evaluations
):
    calls: list[bool] = []
    branches = Velocity.branches

    def counted(self, *arguments, **options):
        calls.append(torch.is_grad_enabled())
        return branches(self, *arguments, **options)

    monkeypatch.setattr(Velocity, "branches", counted)
    train(change(settings, objective=objective, tokens=4 * CONTEXT, log_every=1))
    assert calls.count(True) == evaluations
