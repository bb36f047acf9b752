"""A layer whose output maps are fitted in closed form to what its block does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from decoders import make_decoders
from training_runs import change, log_of, short_run, teacher_of, weights_of

from lftpipe.base.errors import RunError, SettingsError
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.data.batches import Batch
from lftpipe.flow.part import LeastSquares
from lftpipe.runs import read_settings
from lftpipe.store import Store
from lftpipe.training import TrainingRun, starts, validate
from lftpipe.training import step as training_step
from lftpipe.training.loop import _first_batches
from lftpipe.training.step import pose


@pytest.fixture(scope="module", params=["neox", "neox-sequential", "llama"])
def store(request, tmp_path_factory, teachers, text_folder) -> Path:
    return extracted(tmp_path_factory.mktemp("readout"), teachers[request.param], text_folder)


@pytest.fixture
def settings(store, tmp_path) -> TrainSettings:
    return short_run(store, tmp_path, init="readout")


def training(settings: TrainSettings, **changes) -> TrainingRun:
    store = Store.open(settings.store)
    run = TrainingRun(
        Path(settings.run), change(settings, **changes), store, teacher_of(store, Path("unused")), [(1, 3)]
    )
    run.flow.eval()
    return run


def batches_of(run: TrainingRun) -> list[Batch]:
    return list(_first_batches(run, (1, 3)))


@torch.no_grad()
def error(run: TrainingRun, batches: list[Batch]) -> float:
    losses = [
        run.parts[0].scale(pose(run, batch, equal_steps=True).end - batch.states[3], batch.states[3])
        for batch in batches
    ]
    return sum(loss.item() for loss in losses) / len(losses)


def assert_nearer_on_others(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(settings, objective="regression")
    monkeypatch.setattr(starts, "TOKENS", 16 * 4 * CONTEXT)
    run.num_steps = 16
    first, others = batches_of(run)[:12], batches_of(run)[12:]
    before = error(run, others)
    starts.refit(run, run.parts[0], lambda: first)
    assert error(run, others) < 0.9 * before


def test_it_comes_nearer_to_the_block_s_end_on_sequences_it_was_not_fitted_on(settings, monkeypatch):
    assert_nearer_on_others(settings, monkeypatch)


def test_so_it_does_where_maps_are_stored_transposed(tokenizer, text_folder, tmp_path, monkeypatch):
    teacher = make_decoders(tmp_path, ["gpt2"], tokenizer)["gpt2"]
    store = extracted(tmp_path / "workspace", teacher, text_folder, layers="1,3")
    assert_nearer_on_others(short_run(store, tmp_path, init="readout"), monkeypatch)


def test_a_block_that_is_a_layer_with_other_maps_is_found(settings, monkeypatch):
    """What the maps read is right from the start, so the fit needs no more than to solve.

    Where the MLP reads what attention gives, that is so for its own map alone.
    """
    run = training(settings, objective="regression")
    monkeypatch.setattr(starts, "READOUT_RIDGE", 1e-9)
    target = training(settings, objective="regression")
    layer: Any = run.flow.layer
    form: Any = layer.form
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        changed = [form.attention.output, form.mlp.output][not layer.parallel :]
        for name in changed:
            theirs: Any = target.flow.layer
            for parameter in theirs.layer.get_submodule(name).parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        batches = [
            replace(batch, states=dict(batch.states) | {3: pose(target, batch, equal_steps=True).end})
            for batch in batches_of(run)
        ]
    before = error(run, batches)
    starts.refit(run, run.parts[0], lambda: batches)
    assert error(run, batches) < 1e-4 * before


def test_a_run_begins_with_it_and_goes_on_from_a_checkpoint_without(settings, tmp_path, monkeypatch):
    train(change(settings, run=str(tmp_path / "layer"), init="layer"))
    train(settings)
    first = [log_of(str(tmp_path / name))[0]["loss"] for name in ("layer", "run")]
    assert first[1] < 0.9 * first[0]
    calls = []
    real, fit = training_step.loss_of, starts.refit

    def killed(run, batch):
        if batch.step == 7:
            raise KeyboardInterrupt
        return real(run, batch)

    monkeypatch.setattr(starts, "refit", lambda *given: calls.append(1) or fit(*given))
    monkeypatch.setattr(training_step, "loss_of", killed)
    again = change(settings, run=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(training_step, "loss_of", real)
    train(change(again, resume=True))
    assert calls == [1]
    torch.testing.assert_close(weights_of(again.run), weights_of(settings.run), rtol=0, atol=0)


def test_no_more_is_looked_at_than_the_run_may_see(settings):
    assert len(batches_of(training(settings))) == 12
    assert len(batches_of(training(settings, tokens=1))) == 1


def test_a_linear_map_has_no_readout(settings):
    with pytest.raises(SettingsError, match="--init readout with --objective linear"):
        train(change(settings, objective="linear"))


def test_our_recipe_has_one_layer_with_a_readout(settings, monkeypatch):
    monkeypatch.setattr(validate, "TWO_FOR", 2)  # as a block of five layers or more
    run = train(change(settings, objective="distil", tokens=1))
    assert read_settings(Path(run["run"]))[0]["depth"] == 1


def test_a_layer_that_is_run_in_a_loop_has_no_readout(settings):
    with pytest.raises(SettingsError, match="--init readout with --objective looped"):
        train(change(settings, objective="looped", walk_steps=2))


def test_maps_that_see_parts_of_a_sequence_are_not_fitted(tokenizer, text_folder, tmp_path):
    teacher = make_decoders(tmp_path, ["rwkv"], tokenizer)["rwkv"]
    store = extracted(tmp_path / "workspace", teacher, text_folder, layers="1,3", attention=False)
    with pytest.raises(RunError, match="all positions at once"):
        train(short_run(store, tmp_path, objective="regression", init="readout"))


def test_no_constant_is_fitted_that_maps_without_biases_throw_away(settings, monkeypatch):
    """The block's end is shifted: maps with biases follow, maps without come as near as they can."""

    def fitted_error(run: TrainingRun) -> float:
        batches = [
            replace(batch, states=dict(batch.states) | {3: batch.states[3] + 1.0})
            for batch in batches_of(run)
        ]
        starts.refit(run, run.parts[0], lambda: batches)
        return error(run, batches)

    ours = fitted_error(training(settings, objective="regression"))
    real = LeastSquares.solve
    monkeypatch.setattr(LeastSquares, "solve", lambda self, *, intercept: real(self))
    run = training(settings, objective="regression")
    with_a_constant = fitted_error(run)
    if any("bias" in name for name, _ in run.flow.named_parameters()):
        assert ours == with_a_constant
    else:
        assert ours < 0.95 * with_a_constant
