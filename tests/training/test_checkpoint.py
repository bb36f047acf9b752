"""A checkpoint is written while training goes on, of the moment at which it was begun."""

import threading
from pathlib import Path

import pytest
import torch
from training_runs import change, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.base.errors import RunError
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.store import Store
from lftpipe.training import TrainingRun, checkpoint
from lftpipe.training.checkpoint import Checkpoint, read_checkpoint


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    return short_run(stores["neox"], tmp_path)


@pytest.fixture
def run(settings) -> TrainingRun:
    store = Store.open(settings.store)
    found = TrainingRun(Path(settings.run), settings, store, teacher_of(store), [(1, 3)])
    found.folder.mkdir()
    return found


def held(monkeypatch) -> threading.Event:
    """Writing waits for this event."""
    go, real = threading.Event(), checkpoint.write_atomic

    def write(path, data, **options):
        assert go.wait(20)
        real(path, data, **options)

    monkeypatch.setattr(checkpoint, "write_atomic", write)
    return go


def test_what_is_saved_is_the_moment_of_saving_and_training_does_not_wait(run, monkeypatch):
    go, saved = held(monkeypatch), Checkpoint(run)
    before = {name: value.clone() for name, value in run.flow.state_dict().items()}
    saved.save()
    with torch.no_grad():
        for parameter in run.flow.parameters():
            parameter.fill_(7.0)
    run.step = 9
    assert not (run.folder / runs.CHECKPOINT).exists()
    go.set()
    saved.wait()
    saved.restore()
    assert run.step == 0
    torch.testing.assert_close(dict(run.flow.state_dict()), before, rtol=0, atol=0)


def test_an_error_of_the_disk_is_heard(run, monkeypatch):
    def write(path, data, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", write)
    saved = Checkpoint(run)
    saved.save()
    with pytest.raises(OSError, match="No space left"):
        saved.save()
    saved.wait()


def test_a_full_disk_ends_training(settings, monkeypatch):
    def write(path, data, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", write)
    with pytest.raises(OSError, match="No space left"):
        train(settings)
    assert not (Path(settings.run) / runs.MANIFEST).exists()


def test_a_killed_run_leaves_the_checkpoint_that_was_being_written(settings, monkeypatch, tmp_path):
    train(settings)
    broken = change(settings, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        go = held(patch)
        threading.Timer(0.3, go.set).start()
        stop_before(patch, 5)  # as soon as its writing was begun
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    state = read_checkpoint(tmp_path / "broken" / runs.CHECKPOINT, None)
    assert state["step"] == 5
    train(change(broken, resume=True))
    torch.testing.assert_close(weights_of(broken.run), weights_of(settings.run), rtol=0, atol=0)


def test_the_clock_alone_decides_where_no_steps_are_given(settings, monkeypatch):
    """Every step takes longer than the time between checkpoints here, and none does in the second run."""
    by_clock = change(settings, checkpoint_every=0, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(by_clock)
    state = read_checkpoint(Path(settings.run) / runs.CHECKPOINT, None)
    assert state["step"] == 7
    rarely = change(settings, checkpoint_every=0, checkpoint_minutes=1e9, run=settings.run + "-rarely")
    with monkeypatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(rarely)
    assert not (Path(str(rarely.run)) / runs.CHECKPOINT).exists()


def test_a_run_may_go_on_with_other_threads_but_not_with_another_seed(settings, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    with pytest.raises(RunError, match="seed = 1 for"):
        train(change(settings, resume=True, seed=1))
    monkeypatch.setattr("lftpipe.training.validate.torch.get_num_threads", lambda: 3)
    assert train(change(settings, resume=True))["steps"] == 12
    assert runs.read_settings(Path(settings.run))[0]["threads"] == 3
