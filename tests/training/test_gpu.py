"""The laws of training on a GPU; skipped where there is none. They have not been run on one yet."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import change, log_of, short_run, stop_before, weights_of

from lftpipe import runs
from lftpipe.base.device import CopyStream, move
from lftpipe.base.errors import DivergenceError
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.training import step as training_step
from lftpipe.training.checkpoint import read_checkpoint
from lftpipe.training.run import look_every

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    """AdamW, since Muon's rounding in bfloat16 makes devices part."""
    given = {"optimizer": "adamw", "learning_rate": 1e-3, "device": "cuda"}
    return short_run(stores["neox"], tmp_path, **given)


def losses(run: str | None) -> list[float]:
    return [row["loss"] for row in log_of(run)]


@pytest.mark.parametrize("loss", ["fw", "sfm", "fw:0.1,logits", "trajectory"])
def test_the_losses_are_those_of_the_processor(settings, tmp_path, loss):
    train(change(settings, loss=loss))
    train(change(settings, loss=loss, device="cpu", run=str(tmp_path / "cpu")))
    assert losses(settings.run) == pytest.approx(losses(str(tmp_path / "cpu")), rel=1e-3)


def test_the_live_teacher_gives_the_caches_losses(settings, tmp_path):
    train(settings)
    train(change(settings, from_teacher=True, run=str(tmp_path / "live")))
    assert losses(settings.run) == pytest.approx(losses(str(tmp_path / "live")), rel=1e-2)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_killed_run_goes_on_there_or_on_a_processor(settings, tmp_path, monkeypatch, device):
    train(settings)
    broken = change(settings, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(change(broken, resume=True, device=device))
    assert losses(broken.run) == pytest.approx(losses(settings.run), rel=1e-3)


def test_a_run_that_diverges_ends_with_the_checkpoint_before(settings, monkeypatch):
    real = training_step.loss_of

    def loss_of(run, batch):
        loss = real(run, batch)
        return loss * (float("nan") if batch.step == 6 else 1.0)

    monkeypatch.setattr(training_step, "loss_of", loss_of)
    with pytest.raises(DivergenceError, match="at step 6 of"):
        train(change(settings, log_every=100))
    state = read_checkpoint(Path(settings.run) / runs.CHECKPOINT, None)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_a_step_waits_for_nothing(settings):
    """Torch raises at whatever synchronises, in steps at which nobody looks."""
    assert look_every(torch.device("cuda")) > 5
    real, quiet = training_step.take_step, []

    def take_step(*given, look):
        if look:
            return real(*given, look=look)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*given, look=look)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            quiet.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lftpipe.training.loop.take_step", take_step)
        train(change(settings, log_every=6, checkpoint_every=0))
    assert len(quiet) == 10


def test_what_is_copied_beside_computations_arrives_whole():
    device = torch.device("cuda")
    copies = CopyStream(device)
    source = copies.allocate((1000, 1000), torch.zeros(0).numpy().dtype)
    for number in range(20):
        source[:] = number
        with copies.copying():
            there = move(torch.from_numpy(source), device).float()
        mark = copies.mark()
        copies.arrive(mark, [there])
        assert (there == number).all()
        copies.wait(mark)


def test_a_finished_run_opens_on_a_processor(settings):
    train(settings)
    assert json.loads((Path(settings.run) / runs.MANIFEST).read_text())["train_tokens"] == settings.tokens
    assert all(value.device.type == "cpu" for value in weights_of(settings.run).values())
