"""Losses in stages, averaged and best weights, and what is logged beside them."""

from pathlib import Path

import pytest
import torch
from conftest import CONTEXT
from training_runs import assert_same_weights, change, log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.store import Store
from lftpipe.training import TrainingRun
from lftpipe.training.loop import HoldOut


@pytest.fixture
def settings(store_with_logits, tmp_path) -> TrainSettings:
    return short_run(store_with_logits, tmp_path, walk_steps=2)


@pytest.fixture(scope="module")
def plain(store_with_logits, tmp_path_factory) -> Path:
    """The folder of a run with no option."""
    settings = short_run(store_with_logits, tmp_path_factory.mktemp("plain"), walk_steps=2)
    train(settings)
    return Path(str(settings.run))


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
    train(change(settings, objective=objective, loss=loss, tokens=3 * settings.tokens, learning_rate=8e-3))
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


def test_a_stage_has_its_own_terms_in_the_schedule_of_the_whole(settings, plain):
    train(change(settings, loss="fw@0.5/sfm", log_every=1))
    staged, alone = log_of(settings.run), log_of(plain)
    assert [row["learning_rate"] for row in staged] == [row["learning_rate"] for row in alone]
    assert [row["loss"] for row in staged[:6]] == [row["loss"] for row in alone[:6]]
    assert staged[6]["loss"] != alone[6]["loss"]


@pytest.fixture(scope="module")
def with_all_options(store_with_logits, tmp_path_factory) -> TrainSettings:
    """Of a run that is done."""
    options = {"loss": "fw@0.5/fw:0.1,logits", "ema": 0.9, "hold_back": 0.2, "evaluate_every": 2}
    settings = short_run(store_with_logits, tmp_path_factory.mktemp("options"), walk_steps=2, **options)
    train(settings)
    return settings


@pytest.mark.parametrize("killed", [3, 7, 11])
def test_with_all_options_a_resumed_run_equals_the_unbroken_one(
    with_all_options, tmp_path, monkeypatch, killed
):
    settings = with_all_options
    broken = change(settings, run=str(tmp_path / "broken"))
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


def test_the_average_of_weights_lies_between_start_and_end(settings, plain, tmp_path):
    train(change(settings, ema=0.999, run=str(tmp_path / "average")))
    teacher = teacher_of(Store.open(settings.store), Path("unused"))
    start = TrainingRun(
        Path("unused"), settings, Store.open(settings.store), teacher, [(1, 3)]
    ).flow.state_dict()
    last, average = weights_of(plain), weights_of(tmp_path / "average")
    name = "layer.layer.mlp.dense_h_to_4h.weight"
    moved, averaged = (weights[name] - start[name] for weights in (last, average))
    assert 0.1 * moved.norm() < averaged.norm() < moved.norm()
    assert log_of(plain)[-1]["loss"] == log_of(tmp_path / "average")[-1]["loss"]  # training is the same


def test_what_is_held_back_is_never_trained_on(settings, monkeypatch):
    seen = set()
    real = Store._rows

    def rows(self, array, split, layer, sequences, out):
        if array == "hidden" and split == "train" and layer == 3:
            seen.update(map(int, sequences))
        return real(self, array, split, layer, sequences, out)

    monkeypatch.setattr(Store, "_rows", rows)
    monkeypatch.setattr(HoldOut, "evaluate", lambda self: {})
    total = Store.open(settings.store).num_sequences("train")
    train(change(settings, tokens=3 * total * CONTEXT, hold_back=0.25))
    assert seen == set(range(total - total // 4))


def test_the_best_weights_on_what_is_held_back_are_kept(settings, monkeypatch, tmp_path):
    """An evaluation that says the fourth step was best makes the run end with that step's weights."""
    real, copies = HoldOut.evaluate, {}

    def evaluate(self):
        run = self.run
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
            learning_rate=0.0,  # no loss is better than the first
            tokens=50 * settings.tokens,
        )
    )
    assert result["steps"] < 100
    losses = [row["held_back_loss"] for row in log_of(settings.run) if "held_back_loss" in row]
    assert min(losses[-2:]) >= min(losses[:-2])
    assert runs.open_run(Path(settings.run)).train_tokens == result["train_tokens"]


def test_validation_is_logged_and_decides_nothing(settings, plain):
    train(change(settings, evaluate_every=3))
    assert_same_weights(settings.run, plain)
    rows = [row for row in log_of(settings.run) if "validation_nmse" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert not any("held_back_loss" in row for row in rows)


def test_what_is_held_back_counts_by_sequence_though_the_last_batch_is_smaller(settings):
    """And the NMSE is that of all of it, no mean of the batches' ratios."""
    store = Store.open(settings.store)
    held_back = 6 / store.num_sequences("train")
    found = []
    for sequences in (4, 6):  # a batch of four and one of two, or one of six
        wanted = change(
            settings, objective="regression", hold_back=held_back, batch_tokens=sequences * CONTEXT
        )
        run = TrainingRun(Path(str(wanted.run)), wanted, store, teacher_of(store), [(1, 3)])
        run.weights.follow(1)
        assert store.num_sequences("train") - run.order.num_sequences == 6
        found.append(HoldOut(run).evaluate())
    assert set(found[0]) == {"held_back_loss", "held_back_nmse", "validation_nmse"}
    assert found[0] == pytest.approx(found[1], rel=1e-5)
