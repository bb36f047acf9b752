"""Divergence is noticed in time though not every step is looked at, and batches are moved one ahead."""

import math

import pytest
import torch
from conftest import CONTEXT
from training_runs import change, log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.base.errors import DivergenceError
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.data.batches import BatchFields, BatchOrder, BatchReader
from lftpipe.store import Store
from lftpipe.training import run
from lftpipe.training import step as training_step
from lftpipe.training.checkpoint import read_checkpoint


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    """Twelve steps, a line for every fourth and a checkpoint after every fifth."""
    return short_run(stores["neox"], tmp_path, log_every=4)


@pytest.fixture
def rare_looks(monkeypatch):
    """As on a GPU: a processor too looks only now and then."""
    monkeypatch.setattr(run, "LOOK_EVERY", {"cpu": 100})


def test_the_first_step_that_was_not_finite_is_remembered():
    seen = run.DivergenceWatch(torch.device("cpu"))
    for step, loss in enumerate([0.5, 0.25, math.nan, 0.125, math.inf]):
        seen.add(step, torch.tensor(loss), torch.tensor(1.0))
        assert seen.look().diverged_at == (None if step < 2 else 2)
    assert math.isnan(seen.look().loss)


def test_a_finite_loss_with_a_gradient_that_is_not_counts_too():
    seen = run.DivergenceWatch(torch.device("cpu"))
    seen.add(7, torch.tensor(0.5), torch.tensor(math.inf))
    assert seen.look() == (0.5, math.inf, 7)


def test_looking_now_and_then_changes_no_number(settings, tmp_path, rare_looks, monkeypatch):
    train(settings)
    monkeypatch.undo()
    train(change(settings, run=str(tmp_path / "every")))
    torch.testing.assert_close(weights_of(settings.run), weights_of(tmp_path / "every"), rtol=0, atol=0)
    same = ("step", "loss", "nmse", "learning_rate")
    ours, theirs = (
        [[row[key] for key in same] for row in log_of(run)] for run in (settings.run, tmp_path / "every")
    )
    assert ours == theirs


@pytest.mark.parametrize(("poisoned", "kept"), [(6, 5), (8, 5), (10, 10)])
def test_no_wrong_weights_are_kept_by_one_who_looks_late(
    settings, tmp_path, rare_looks, monkeypatch, poisoned, kept
):
    """The run ends with the checkpoint before the step that diverged, and names that step."""
    real = training_step.loss_of

    def loss_of(run, batch):
        loss = real(run, batch)
        return loss * (math.nan if batch.step == poisoned else 1.0)

    monkeypatch.setattr(training_step, "loss_of", loss_of)
    with pytest.raises(DivergenceError, match=f"at step {poisoned} of"):
        train(settings)
    state = read_checkpoint(tmp_path / "run" / runs.CHECKPOINT, None)
    assert state["step"] == kept
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())
    assert all(math.isfinite(row["loss"]) for row in log_of(settings.run))
    monkeypatch.setattr(training_step, "loss_of", real)
    assert train(change(settings, resume=True, learning_rate=1e-3))["steps"] == 12


def test_the_best_weights_are_never_those_of_a_run_that_diverged(settings, rare_looks, monkeypatch):
    real = training_step.loss_of

    def loss_of(run, batch):
        loss = real(run, batch)
        return loss * (math.nan if run.step == 5 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(training_step, "loss_of", loss_of)
    with pytest.raises(DivergenceError, match="at step 5 of"):
        train(change(settings, hold_back=0.2, evaluate_every=7, checkpoint_every=100, log_every=100))
    assert not (settings.store.parent / "runs" / "run" / runs.WEIGHTS).exists()


def test_a_killed_run_that_looks_rarely_goes_on_to_the_same_end(settings, tmp_path, rare_looks, monkeypatch):
    train(settings)
    broken = change(settings, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(change(broken, resume=True))
    torch.testing.assert_close(weights_of(broken.run), weights_of(settings.run), rtol=0, atol=0)


class FakeCopies:
    """Copies beside the computations of a device that is none, in the order in which they are asked for."""

    beside = True

    def __init__(self, events: list[str]) -> None:
        self.events, self.marks = events, 0

    def allocate(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=torch.from_numpy(dtype.type(0)[None]).dtype).numpy()

    def copying(self):
        self.events.append("copy")
        return torch.no_grad()

    def mark(self):
        self.marks += 1
        return self.marks

    def wait(self, mark):
        self.events.append(f"wait {mark}")

    def arrive(self, mark, tensors):
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        self.events.append(f"arrive {mark}")


def test_each_batch_is_copied_while_the_one_before_is_used(stores):
    """And the reader gets its memory back only after the copy from it."""
    store = Store.open(stores["neox"])
    reader = BatchReader(store, teacher_of(store), "cpu")
    fields, order = BatchFields((1, 3)), BatchOrder(4, 0, 40)
    plain = reader.shuffled(fields, order, 3)
    expected = [next(plain) for _ in range(5)]
    events: list[str] = []
    reader.copies = FakeCopies(events)  # pyright: ignore[reportAttributeAccessIssue]
    ahead = reader.shuffled(fields, order, 3)
    for number, batch in enumerate(expected, start=1):
        got = next(ahead)
        events.append(f"use {number}")
        assert got.step == batch.step
        assert got.tokens.shape == (4, CONTEXT)
        assert torch.equal(got.states[3], batch.states[3])
    assert events[:8] == ["copy", "wait 1", "copy", "arrive 1", "use 1", "wait 2", "copy", "arrive 2"]
