"""Losses in stages, averaged and best weights, several runs at once, jointly, and in several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from training_runs import change, log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.errors import DivergenceError, RunError, SettingsError
from lftpipe.stages.train import train
from lftpipe.store import Store
from lftpipe.training import TrainingRun
from lftpipe.training.holdout import HoldOut


@pytest.fixture(scope="module")
def store(tmp_path_factory, teachers, text_folder) -> Path:
    return extracted(
        tmp_path_factory.mktemp("options"), teachers["neox"], text_folder, logits=VOCABULARY_KEPT
    )


VOCABULARY_KEPT = 8


@pytest.fixture
def settings(store, tmp_path) -> TrainSettings:
    return short_run(store, tmp_path, walk_steps=2)


def assert_same_weights(one: str | Path, other: str | Path, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights_of(one), weights_of(other), **tolerance)


# Losses


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        ("fw", "branches"),
        ("fw", "logits"),
        ("fw", "top-logits"),
        ("regression", "regression,logits"),
        ("fw", "fw,sfm:0.5,trajectory:0.2,branches:0.3"),
    ],
)
def test_every_term_goes_down(settings, objective, loss):
    train(change(settings, objective=objective, loss=loss, tokens=5 * settings.tokens, learning_rate=5e-3))
    losses = [row["loss"] for row in log_of(settings.run)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_hybrid_is_walking_plus_alpha_times_matching(settings, tmp_path):
    train(change(settings, objective="hybrid", alpha=0.3))
    train(change(settings, loss="fw,sfm:0.3", run=str(tmp_path / "sum")))
    assert_same_weights(tmp_path / "run", tmp_path / "sum")
    losses = {}
    for loss in ("fw", "sfm", "fw,sfm:0.3"):
        name = str(tmp_path / loss.replace(":", "="))
        train(change(settings, loss=loss, run=name))
        losses[loss] = log_of(name)[0]["loss"]
    assert losses["fw,sfm:0.3"] == pytest.approx(losses["fw"] + 0.3 * losses["sfm"], rel=1e-5)


def test_hybrid_tends_to_walking_as_alpha_does_to_zero(settings, tmp_path):
    settings = change(settings, optimizer="adamw")  # Muon's rounding in bfloat16 would make them part
    train(change(settings, objective="hybrid", alpha=1e-9))
    train(change(settings, run=str(tmp_path / "walk")))
    ours, theirs = ([row["loss"] for row in log_of(run)] for run in (settings.run, tmp_path / "walk"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_one_euler_step_of_walking_is_regression_with_time(settings, tmp_path):
    """On the same estimator: both regress x_0 + u(x_0, 0) on x_1."""
    train(change(settings, walk_steps=1))
    train(change(settings, objective="regression", run=str(tmp_path / "regression")))
    first, second = (log_of(run)[0]["loss"] for run in (settings.run, tmp_path / "regression"))
    assert first == pytest.approx(second, rel=1e-6)


def test_equal_walk_times_are_those_of_inference(settings):
    train(change(settings, walk_times="equal", loss_scale="none"))
    row = log_of(settings.run)[-1]
    assert row["loss"] == pytest.approx(row["nmse"], rel=0.2)  # before and after the last step


def test_a_stage_has_its_own_terms_in_the_schedule_of_the_whole(settings, tmp_path):
    train(change(settings, loss="fw@0.5/sfm", log_every=1))
    train(change(settings, loss="fw", run=str(tmp_path / "alone")))
    staged, alone = (log_of(run) for run in (settings.run, tmp_path / "alone"))
    assert [row["learning_rate"] for row in staged] == [row["learning_rate"] for row in alone]
    assert [row["loss"] for row in staged[:6]] == [row["loss"] for row in alone[:6]]
    assert staged[6]["loss"] != alone[6]["loss"]


@pytest.mark.parametrize("killed", [3, 7, 11])
def test_with_all_options_a_resumed_run_equals_the_unbroken_one(settings, tmp_path, monkeypatch, killed):
    options = {"loss": "fw@0.5/fw:0.1,logits", "ema": 0.9, "hold_back": 0.2, "evaluate_every": 2}
    train(change(settings, **options))
    broken = change(settings, **options, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, killed)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(change(broken, resume=True))
    assert_same_weights(tmp_path / "broken", settings.run)
    strip = ("seconds", "data_wait_seconds")
    ours, theirs = (
        [{key: value for key, value in row.items() if key not in strip} for row in log_of(run)]
        for run in (tmp_path / "broken", settings.run)
    )
    assert ours == theirs
    seconds = [row["seconds"] for row in log_of(tmp_path / "broken")]
    assert seconds == sorted(seconds)  # they go on where they were


# Which weights are kept


def test_the_average_of_weights_lies_between_start_and_end(settings, tmp_path):
    train(settings)
    train(change(settings, ema=0.999, run=str(tmp_path / "average")))
    teacher = teacher_of(Store.open(settings.store), Path("unused"))
    start = TrainingRun(
        Path("unused"), settings, Store.open(settings.store), teacher, (1, 3)
    ).flow.state_dict()
    last, average = weights_of(settings.run), weights_of(tmp_path / "average")
    name = "layer.layer.mlp.dense_h_to_4h.weight"
    moved, averaged = (weights[name] - start[name] for weights in (last, average))
    assert 0.1 * moved.norm() < averaged.norm() < moved.norm()
    assert (
        log_of(settings.run)[-1]["loss"] == log_of(tmp_path / "average")[-1]["loss"]
    )  # training is the same


def test_what_is_held_back_is_never_trained_on(settings, monkeypatch):
    seen = set()
    real = Store._rows

    def rows(self, array, split, layer, sequences, out):
        if array == "hidden" and split == "train" and layer == 3:
            seen.update(map(int, sequences))
        return real(self, array, split, layer, sequences, out)

    monkeypatch.setattr(Store, "_rows", rows)
    monkeypatch.setattr(HoldOut, "evaluate", lambda self: {run.folder: {} for run in self.runs})
    total = Store.open(settings.store).num_sequences("train")
    train(change(settings, tokens=3 * total * CONTEXT, hold_back=0.25))
    assert seen == set(range(total - total // 4))


def test_the_best_weights_on_what_is_held_back_are_kept(settings, monkeypatch, tmp_path):
    """An evaluation that says the fourth step was best makes the run end with that step's weights."""
    real, copies = HoldOut.evaluate, {}

    def evaluate(self):
        (run,) = self.runs
        copies[run.step] = {name: value.clone() for name, value in run.flow.state_dict().items()}
        found = real(self)
        run.judge(abs(run.step - 4) - 100.0)
        return found

    monkeypatch.setattr(HoldOut, "evaluate", evaluate)
    train(change(settings, hold_back=0.1, evaluate_every=1))
    torch.testing.assert_close(weights_of(settings.run), dict(copies[4]), rtol=0, atol=0)


def test_to_hold_back_is_to_evaluate(settings):
    """Without a word on how often, or nothing would come of it."""
    train(change(settings, hold_back=0.25))
    assert "held_back_loss" in log_of(settings.run)[-1]


def test_training_stops_once_what_is_held_back_gets_no_better(settings):
    result = train(
        change(
            settings,
            hold_back=0.1,
            evaluate_every=2,
            patience=2,
            learning_rate=1e-9,
            tokens=50 * settings.tokens,
        )
    )
    assert result["steps"] < 100
    losses = [row["held_back_loss"] for row in log_of(settings.run) if "held_back_loss" in row]
    assert min(losses[-2:]) >= min(losses[:-2])
    assert runs.open_run(Path(settings.run)).train_tokens == result["train_tokens"]


def test_validation_is_logged_and_decides_nothing(settings, tmp_path):
    train(change(settings, evaluate_every=3))
    train(change(settings, run=str(tmp_path / "unwatched")))
    assert_same_weights(settings.run, tmp_path / "unwatched")
    rows = [row for row in log_of(settings.run) if "validation_nmse" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert not any("held_back_loss" in row for row in rows)


def test_tensorboards_events_are_written(settings):
    pytest.importorskip("tensorboard")
    train(change(settings, tensorboard=True))
    assert list((Path(settings.run) / "tensorboard").glob("events.*"))


# Several runs


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train]\nwalk_steps = 2\n[train.variants.a]\nobjective = 'regression'\n"
        "[train.variants.b]\nsolver = 'euler'\nloss = 'fw@0.5/sfm'\n"
        "[train.variants.c]\nobjective = 'linear'\n"
    )
    return path


def test_variants_trained_from_the_same_batches_equal_runs_on_their_own(settings, tmp_path, store):
    given = {
        key: getattr(settings, key)
        for key in ("store", "block", "tokens", "batch_tokens", "compute_dtype", "log_every")
    }
    together = train(from_recipe(TrainSettings, recipe(tmp_path), "train", given))
    assert [Path(result["run"]).name for result in together["runs"]] == [
        "a-1-3-seed0",
        "b-1-3-seed0",
        "c-1-3-seed0",
    ]
    folder = store.parent / "runs"
    for name, changes in (
        ("a", {"objective": "regression", "solver": "midpoint"}),
        ("b", {"loss": "fw@0.5/sfm"}),
        ("c", {"objective": "linear"}),
    ):
        train(change(settings, run=str(tmp_path / name), **changes))
        assert_same_weights(folder / f"{name}-1-3-seed0", tmp_path / name)
    again = train(from_recipe(TrainSettings, recipe(tmp_path), "train", given | {"run": "a,c"}))
    assert [result["already_finished"] for result in again["runs"]] == [True, True]


def test_a_variant_that_is_not_there_or_misspelt_is_refused(settings, tmp_path):
    with pytest.raises(SettingsError, match=r"--run d / expected: one of the recipe's variants: a, b, c"):
        train(from_recipe(TrainSettings, recipe(tmp_path), "train", {"run": "d", "store": settings.store}))
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("objective", "objctive"))
    with pytest.raises(SettingsError, match=r"'objctive' in \[train\.variants\.a\] of .* / expected: one of"):
        from_recipe(TrainSettings, path, "train", {})
    path.write_text("[train.variants.a]\nseed = 1\n[train.variants.b]\nseed = 2\n")
    with pytest.raises(
        SettingsError, match=r"seed = 2 for b-1-3-seed0, 1 for another run / expected: the same"
    ):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


def test_a_variant_out_of_range_is_refused(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[train.variants.a]\nema = 3.0\n")
    with pytest.raises(SettingsError, match=r"ema = 3.0 in \[train.*variants.* / expected: at most 1"):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


def test_a_variant_that_diverges_leaves_the_others_alone(settings, tmp_path, store):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train.variants.wild]\nlearning_rate = 1e30\nclip = 0\n[train.variants.tame]\nseed = 0\n"
    )
    given = {
        key: getattr(settings, key) for key in ("store", "block", "tokens", "batch_tokens", "compute_dtype")
    }
    with pytest.raises(DivergenceError, match=r"of .*wild-1-3-seed0 / expected: finite ones"):
        train(from_recipe(TrainSettings, path, "train", given))
    assert runs.open_run(store.parent / "runs" / "tame-1-3-seed0").train_tokens == settings.tokens


def test_several_blocks_give_a_run_each(settings):
    result = train(change(settings, block="0:2,2:3"))
    assert [each["block"] for each in result["runs"]] == [[0, 2], [2, 3]]
    assert all(runs.open_run(Path(each["run"])).train_tokens == settings.tokens for each in result["runs"])


def test_jointly_the_second_flow_layer_learns_from_where_the_first_ends(settings, tmp_path):
    apart = train(change(settings, block="0:1,2:3", run=str(tmp_path / "apart")))["runs"]
    joint = train(change(settings, block="0:1,2:3", joint=True, run=str(tmp_path / "joint")))["runs"]
    # At the first step both second layers are the teacher's; only their inputs differ.
    first, second = ([log_of(each["run"])[0]["loss"] for each in both] for both in (apart, joint))
    assert first[0] == second[0] and first[1] < second[1]


def test_a_killed_joint_run_goes_on_and_ends_the_same(settings, tmp_path, monkeypatch):
    joint = change(settings, block="0:1,2:3", joint=True)
    unbroken = train(joint)["runs"]
    broken = change(joint, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    resumed = train(change(broken, resume=True))["runs"]
    for one, other in zip(resumed, unbroken, strict=True):
        assert_same_weights(one["run"], other["run"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "0:2,1:3", "joint": True}, r"--joint with blocks 0:2, 1:3 / expected: blocks in order"),
        ({"block": "1:3,1:3"}, r"several runs of the same name"),
        ({"block": "0:1,2:3", "joint": True, "objective": "linear"}, r"--joint with --objective linear"),
        ({"device": "nonsense"}, r"--device nonsense / expected: cpu, cuda, cuda:N or mps"),
        ({"objective": "regression", "loss": "fw"}, r"--loss fw with --objective regression"),
        ({"objective": "hybrid", "loss": "fw"}, r"--loss with --objective hybrid / expected: one of the two"),
        ({"patience": 3, "evaluate_every": 1}, r"--patience without --hold-back"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        train(change(settings, **changes))


def test_terms_that_the_store_cannot_serve_are_refused(settings, teachers, text_folder, tmp_path):
    bare = extracted(tmp_path, teachers["neox"], text_folder, attention=False)
    with pytest.raises(SettingsError, match=r"without the attention context of layer 1 .* with --attention"):
        train(change(settings, store=bare, loss="branches"))
    with pytest.raises(SettingsError, match=r"without logits .* extract with --logits 64"):
        train(change(settings, store=bare, loss="top-logits"))


# Several processes


@pytest.mark.parametrize("loss_scale", ["token", "none"])
def test_two_processes_have_the_loss_of_one_at_the_same_batch(settings, tmp_path, loss_scale):
    arguments = [
        *("train", "--store", str(settings.store), "--block", "1:3", "--tokens", str(settings.tokens)),
        *("--batch-tokens", str(settings.batch_tokens), "--compute-dtype", "float32", "--solver", "euler"),
        *("--walk-steps", "2", "--log-every", "1", "--loss-scale", loss_scale, "--threads", "1"),
        *("--optimizer", "adamw", "--learning-rate", "0.001"),  # Muon rounds to bfloat16: they would part
    ]
    alone = change(settings, loss_scale=loss_scale, threads=1, optimizer="adamw", learning_rate=1e-3)
    train(alone)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "--", "lftpipe", *arguments, "--run", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: lftpipe evaluate") == 1  # one of the two speaks
    ours, theirs = ([row["loss"] for row in log_of(run)] for run in (settings.run, tmp_path / "two"))
    assert theirs == pytest.approx(ours, rel=1e-5)
    two, one = weights_of(tmp_path / "two"), weights_of(settings.run)
    # Keys' biases have no gradient but rounding, which AdamW scales to whole steps.
    for weights in (two, one):
        weights["layer.layer.attention.query_key_value.bias"].view(4, 3, -1)[:, 1] = 0
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.training.processes.count", lambda: 3)
    with pytest.raises(RunError, match=r"a batch of 4 sequences for 3 processes / expected: a multiple"):
        train(settings)
