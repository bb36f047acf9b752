"""Velocities that see more than the state and the time, and walks that train them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import extracted
from training_runs import change, log_of, short_run, teacher_of

from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, TrainSettings
from lftpipe.data.batches import Batch
from lftpipe.store import Store
from lftpipe.training import TrainingRun
from lftpipe.training.step import pose


@pytest.fixture(scope="module")
def store(tmp_path_factory, teachers, text_folder) -> Path:
    return extracted(tmp_path_factory.mktemp("conditions"), teachers["neox"], text_folder)


@pytest.fixture
def settings(store, tmp_path) -> TrainSettings:
    return short_run(store, tmp_path)


@pytest.mark.slow
def test_a_velocity_that_sees_the_source_learns_crossing_pairs_apart(settings, tmp_path):
    """At first it is the one that does not; then it fits better, as it has more to go by."""
    losses = {}
    for condition in ("none", "source"):
        run = str(tmp_path / condition)
        train(change(settings, condition=condition, run=run, tokens=8 * settings.tokens, learning_rate=5e-3))
        losses[condition] = [row["loss"] for row in log_of(run)]
    assert losses["source"][0] == losses["none"][0]
    assert sum(losses["source"][-20:]) < sum(losses["none"][-20:])
    with pytest.raises(SettingsError, match=r"--condition source with --objective regression"):
        train(change(settings, condition="source", objective="regression"))


@pytest.mark.parametrize("objective", ["regression", "linear"])
@pytest.mark.parametrize("condition", ["source", "step"])
def test_only_flows_have_conditions(settings, objective, condition):
    with pytest.raises(SettingsError, match=f"--condition {condition} with --objective {objective}"):
        train(change(settings, condition=condition, objective=objective))


@pytest.mark.slow
def test_one_velocity_that_knows_its_step_walks_in_any_number_of_them(settings, tmp_path):
    """Trained on one, two and three equal steps, at one step it leaves a walk of three far behind."""
    nmses = {}
    for condition, walk_times in (("none", "equal"), ("step", "mixed")):
        run = str(tmp_path / condition)
        given = {"condition": condition, "walk_times": walk_times, "learning_rate": 5e-3}
        train(change(settings, run=run, tokens=20 * settings.tokens, **given))
        out = tmp_path / f"{condition}.json"
        table = evaluate(EvaluateSettings(runs=(run,), store=settings.store, k=(1, 3), skips=(), out=out))
        nmses[condition] = {row["k"]: row["nmse"] for row in table["rows"] if row["run"]}
    assert nmses["step"][1] < 0.8 * nmses["none"][1]
    assert nmses["step"][3] < 1.2 * nmses["none"][3]


def test_mixed_walks_have_every_number_of_steps(settings, tmp_path):
    store = Store.open(settings.store)
    mixed = change(settings, walk_times="mixed")
    run = TrainingRun(tmp_path / "run", mixed, store, teacher_of(store, tmp_path), [(1, 3)])
    size = run.order.batch_size
    x, tokens = torch.zeros(size, 4, run.teacher.width), torch.zeros(size, 4, dtype=torch.long)
    batches = [Batch(step, tokens, tokens, {1: x, 3: x}) for step in range(40)]
    problems: list[Any] = [pose(run, batch) for batch in batches]
    grids = [problem.time_grid for problem in problems]
    assert {len(grid) - 1 for grid in grids} == {1, 2, 3}
    for grid in grids:
        torch.testing.assert_close(grid.diff(dim=0), torch.full((len(grid) - 1, size), 1 / (len(grid) - 1)))
    equal: list[Any] = [pose(run, batch, equal_steps=True) for batch in batches]
    assert {len(problem.time_grid) for problem in equal} == {4}
