"""The default learning rate: what was tuned, unless the teacher's weights are small."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT
from torch import nn
from training_runs import short_run

from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.runs import read_settings
from lftpipe.training.optimizer import STEP_SIZE, Muon, peak_rate, weight_size


def layer(size: float) -> nn.Module:
    """Matrices of several shapes whose entries are all of one size, and a vector that does not count."""
    made = nn.ModuleDict({"wide": nn.Linear(64, 16), "tall": nn.Linear(16, 64), "norm": nn.LayerNorm(16)})
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.where(torch.rand_like(weight) < 0.5, -size, size) if weight.ndim == 2 else 1e6)
    return made


@pytest.mark.parametrize(
    ("how", "tuned"),
    [
        ({"optimizer": "muon", "objective": "fw"}, 2e-2),
        ({"optimizer": "muon", "objective": "distil"}, 5e-3),
        ({"optimizer": "adamw", "objective": "fw"}, 3e-3),
    ],
)
def test_the_default_is_what_was_tuned_or_a_fraction_of_small_weights(
    how: dict[str, str], tuned: float
) -> None:
    settings = TrainSettings(**how)  # pyright: ignore[reportArgumentType]
    assert weight_size(layer(0.25)) == pytest.approx(0.25)
    assert peak_rate(settings, layer(0.2)) == tuned
    assert peak_rate(settings, None) == tuned
    small = peak_rate(settings, layer(2e-3))
    assert small < tuned / 4
    assert peak_rate(settings, layer(2e-4)) == pytest.approx(small / 10, rel=0.1)
    assert peak_rate(replace(settings, learning_rate=0.3), layer(2e-3)) == 0.3


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_a_step_is_as_large_as_the_rule_takes_it_to_be(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    steps = {
        "muon": Muon([weight], 0.1, 0.0, torch.float32),
        "adamw": torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0),
    }
    for name, optimizer in steps.items():
        before = weight.detach().clone()
        weight.grad = torch.randn(shape)
        optimizer.step()
        step = (weight.detach() - before).square().mean().sqrt().item()
        assert step == pytest.approx(0.1 * STEP_SIZE[name], rel=0.3)


def test_a_run_records_the_rate_of_its_own_teacher(stores: dict[str, Path], tmp_path: Path) -> None:
    given = short_run(stores["neox"], tmp_path, learning_rate=None, tokens=CONTEXT, objective="regression")
    train(given)
    from training_runs import teacher_of

    from lftpipe.store import Store
    from lftpipe.teacher.layers import load_layer

    settings, _ = read_settings(tmp_path / "run")
    start = load_layer(teacher_of(Store.open(stores["neox"])), int(settings["block"].split(":")[0]))
    assert settings["learning_rate"] == peak_rate(given, start)
