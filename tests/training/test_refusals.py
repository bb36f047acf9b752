"""What training refuses or stops at: divergence, damage, changed settings and teachers."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import change_weights, extracted
from training_runs import change, log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.base.errors import DivergenceError, RunError, SettingsError, StoreError, TeacherError
from lftpipe.commands.train import summary, train
from lftpipe.config.settings import TrainSettings
from lftpipe.training import step as training_step
from lftpipe.training.checkpoint import BEFORE, read_checkpoint


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    """Twelve steps on block 1:3, into a folder of the test's own."""
    return short_run(stores["neox"], tmp_path, solver="midpoint", walk_steps=2)


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
        patch.setattr("lftpipe.training.several.TrainingRun", None)
        again = train(settings)
    assert again["already_finished"]
    assert "nothing was computed" in summary(again)
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


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_stops_the_run_with_its_last_checkpoint(settings, monkeypatch, tmp_path, poison):
    real = training_step.loss_of

    def loss_of(run, batch):
        loss = real(run, batch)
        if batch.step == 7:
            # The square root's slope at 0 is infinite: a finite loss with a gradient that is not.
            loss = loss * float("nan") if poison == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss

    monkeypatch.setattr(training_step, "loss_of", loss_of)
    with pytest.raises(
        DivergenceError, match=r"at step 7 of .* / do: go on from its last checkpoint by --resume"
    ):
        train(settings)
    state = read_checkpoint(tmp_path / "run" / runs.CHECKPOINT, None)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())
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
    change_weights(folder)
    with pytest.raises(TeacherError, match=r"whose weights changed since .* / do: put the old weights back"):
        train(change(settings, store=store))


def test_a_loss_on_branches_is_refused_where_a_layer_has_none(teachers, text_folder, tokenizer, tmp_path):
    from decoders import make_bloom

    folder = make_bloom(tmp_path / "bloom", tokenizer)
    store = extracted(tmp_path, folder, text_folder, attention=False)
    settings = short_run(store, tmp_path, loss="branches", from_teacher=True)
    with pytest.raises(SettingsError, match=r"layer 1 adds no attention output / .*leave branches out"):
        train(settings)
    assert not (tmp_path / "run").exists()


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


def test_a_batch_beyond_the_store_is_refused_before_it_takes_the_memory(settings):
    with pytest.raises(
        SettingsError, match=r"--batch-tokens 10000000 / expected: at most 65536, what the store holds"
    ):
        train(change(settings, batch_tokens=10_000_000))
