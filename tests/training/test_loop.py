import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from training_runs import change, log_of, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.errors import DivergenceError, RunError, SettingsError, StoreError, TeacherError
from lftpipe.stages.train import summary, train
from lftpipe.training import step as training_step
from lftpipe.training.checkpoint import BEFORE, read_checkpoint

OBJECTIVES = ("fw", "sfm", "hybrid", "regression", "trajectory")


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    """Twelve steps on block 1:3, into a folder of the test's own."""
    return TrainSettings(
        store=stores["neox"],
        block="1:3",
        tokens=12 * 4 * CONTEXT,
        batch_tokens=4 * CONTEXT,
        compute_dtype="float32",
        walk_steps=2,
        run=str(tmp_path / "run"),
        log_every=1,
        checkpoint_every=5,
    )


@pytest.mark.parametrize("family", ["neox", "llama"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_goes_down(settings, stores, family, objective):
    more = {"tokens": 60 * 4 * CONTEXT, "learning_rate": 5e-3, "log_every": 3}
    result = train(change(settings, store=stores[family], objective=objective, **more))
    losses = [row["loss"] for row in log_of(result["run"])]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_run_holds_what_the_contract_says(settings):
    result = train(settings)
    run = Path(result["run"])
    assert {path.name for path in run.iterdir()} == {
        "settings.toml",
        "metrics.jsonl",
        "flow.safetensors",
        "manifest.json",
        "checkpoint",
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


def test_the_settings_of_a_run_are_a_recipe_that_makes_it_again(settings, tmp_path):
    train(settings)
    again = from_recipe(
        TrainSettings, tmp_path / "run/settings.toml", "train", {"run": str(tmp_path / "again")}
    )
    assert again.threads == torch.get_num_threads()  # what was left out is recorded as it was settled
    left_out = {"run": settings.run, "threads": settings.threads, "learning_rate": None}
    assert change(again, **left_out) == settings
    train(again)
    torch.testing.assert_close(weights_of(tmp_path / "again"), weights_of(tmp_path / "run"), rtol=0, atol=0)
    assert tomllib.loads((tmp_path / "run/settings.toml").read_text())["store"]["fingerprint"]


@pytest.mark.parametrize("objective", ["fw", "regression"])
@pytest.mark.parametrize("killed", [3, 8, 11])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    settings, tmp_path, monkeypatch, objective, killed
):
    unbroken = change(settings, objective=objective)
    train(unbroken)
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


def test_another_seed_gives_other_weights(settings, tmp_path):
    train(settings)
    train(change(settings, seed=1, run=str(tmp_path / "other")))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "other")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_keeps_its_settings(settings, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    with pytest.raises(
        RunError, match=r"learning_rate = 0.5 for .* / expected: learning_rate = 0.02, as it was"
    ):
        train(change(settings, resume=True, learning_rate=0.5))
    # The same store under another name is the same store.
    folder = settings.store.parent
    moved = folder / ".." / folder.name / settings.store.name
    assert train(change(settings, resume=True, store=moved))["steps"] == 12


def test_a_finished_run_is_left_alone_without_force(settings, monkeypatch):
    train(settings)
    before = weights_of(settings.run)
    with monkeypatch.context() as patch:
        patch.setattr("lftpipe.training.together.TrainingRun", None)
        again = train(settings)
    assert again["already_finished"] and "nothing was computed" in summary(again)
    with pytest.raises(
        RunError, match=r"seed = 1 for .* / do: use the same settings, .* or overwrite it with --force"
    ):
        train(change(settings, seed=1))
    train(change(settings, seed=1, force=True))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(settings.run).items())


def test_a_damaged_checkpoint_is_refused(settings, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    newest = tmp_path / "run" / runs.CHECKPOINT
    newest.write_bytes(b"not a checkpoint")
    newest.with_name(BEFORE).unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"damaged .*state\.pt / expected: a checkpoint"):
        train(change(settings, resume=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("objective", ["fw", "trajectory"])
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


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_stops_the_run_with_its_last_checkpoint(settings, monkeypatch, tmp_path, poison):
    real = training_step.loss_of

    def loss_of(run, batch, x_0=None):
        loss, problem = real(run, batch, x_0)
        if batch.step == 7:
            # The square root's slope at 0 is infinite: a finite loss with a gradient that is not.
            loss = loss * float("nan") if poison == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss, problem

    monkeypatch.setattr(training_step, "loss_of", loss_of)
    with pytest.raises(
        DivergenceError, match=r"at step 7 of .* / do: go on from its last checkpoint by --resume"
    ):
        train(settings)
    (state,) = read_checkpoint(tmp_path / "run" / runs.CHECKPOINT, None)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["flow"].values())
    assert not (tmp_path / "run" / runs.MANIFEST).exists()
    # Tamed, it goes on from there: the metrics show with which rates.
    monkeypatch.setattr(training_step, "loss_of", real)
    with pytest.raises(RunError, match=r"seed = 1 for .* / expected: seed = 0, as it was begun"):
        train(change(settings, resume=True, seed=1))
    assert train(change(settings, resume=True, learning_rate=1e-4))["steps"] == 12
    rates = {row["step"]: row["learning_rate"] for row in log_of(settings.run)}
    assert max(rates[step] for step in (1, 2, 3, 4, 5)) > 1e-4 >= max(rates[step] for step in range(6, 13))


def test_a_run_that_diverges_without_a_checkpoint_says_so(settings, monkeypatch):
    stop = change(settings, checkpoint_every=100)
    monkeypatch.setattr(training_step, "gradient_norm", lambda parameters, clip: torch.tensor(torch.inf))
    with pytest.raises(DivergenceError, match=r"/ do: start it again by --force and a lower --learning-rate"):
        train(stop)


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
    ("changes", "error", "message"),
    [
        ({"block": "9:4"}, SettingsError, "block 9:4 / expected: m:n with m < n / do: try 4:9"),
        ({"block": "2:9"}, SettingsError, "block 2:9 / expected: n at most 4, the teacher's layers"),
        ({"objective": "hybrid", "alpha": 0.0}, SettingsError, "--alpha 0 .* / do: use --objective fw"),
        ({"store": Path("/nowhere")}, StoreError, "store /nowhere / expected: an existing store"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    settings, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message):
        train(change(settings, **changes))
    assert not (tmp_path / "run").exists()


def test_a_changed_teacher_is_noticed(teachers, text_folder, tmp_path, settings):
    folder = tmp_path / "model"
    shutil.copytree(teachers["neox"], folder)
    store = extracted(tmp_path, folder, text_folder)
    shutil.copy(teachers["neox-tied"] / "model.safetensors", folder)
    with pytest.raises(TeacherError, match=r"whose weights changed since .* / do: put the old weights back"):
        train(change(settings, store=store))


# Finished runs, opened again


def test_a_trained_flow_is_read_back_as_it_was(settings, tmp_path):
    train(settings)
    from lftpipe.store import Store

    run = runs.open_run(tmp_path / "run")
    flow = runs.load_flow(run, teacher_of(Store.open(settings.store), Path("unused")))
    torch.testing.assert_close(dict(flow.state_dict()), weights_of(tmp_path / "run"), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in flow.parameters())


def test_a_damaged_run_is_refused(settings, tmp_path):
    train(settings)
    weights = tmp_path / "run" / runs.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="expected: the weights that the manifest was written for"):
        runs.open_run(tmp_path / "run")
    (tmp_path / "run" / runs.MANIFEST).write_text("{}")
    with pytest.raises(RunError, match=r"expected: a finished run with a readable manifest\.json"):
        runs.open_run(tmp_path / "run")
