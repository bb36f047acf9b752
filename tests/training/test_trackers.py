"""`--track`: what reaches a tracker, that it is closed, and what is said where its package is missing."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import change, log_of, short_run, stop_before

from lftpipe.base.errors import SettingsError
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import HealSettings, TrainSettings


class FakeService:
    """The calls of Weights & Biases and Trackio that lftpipe makes."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> SimpleNamespace:
        self.inits.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        assert not self.finished
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def settings(store_with_logits: Path, tmp_path: Path) -> TrainSettings:
    return short_run(store_with_logits, tmp_path, objective="regression")


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, FakeService]:
    fake = FakeService()
    monkeypatch.setitem(sys.modules, request.param, fake)
    return request.param, fake


def test_every_line_of_the_metrics_reaches_the_service(
    settings: TrainSettings, service: tuple[str, FakeService]
) -> None:
    name, fake = service
    train(change(settings, track=name))
    lines = log_of(settings.run)
    assert [step for step, _ in fake.rows] == [line["step"] for line in lines]
    assert [row["loss"] for _, row in fake.rows] == [line["loss"] for line in lines]
    (options,) = fake.inits
    assert (options["project"], options["name"], options["resume"]) == ("lftpipe", "run", "allow")
    assert options["config"]["block"] == "1:3"
    assert fake.finished == 1


def test_a_resumed_run_goes_on_as_the_same_run_of_the_service(
    settings: TrainSettings, service: tuple[str, FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, fake = service
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(change(settings, track=name))
    assert fake.finished == 1  # closed however the run ended
    fake.finished = 0
    train(change(settings, track=name, resume=True))
    first, second = fake.inits
    assert first.get("id") == second.get("id")
    assert name != "wandb" or first["id"]
    assert fake.rows[-1][0] == 12


def test_healing_is_tracked(
    settings: TrainSettings, service: tuple[str, FakeService], tmp_path: Path
) -> None:
    train(settings)
    name, fake = service
    run = str(tmp_path / "healed")
    options: dict[str, Any] = {"tokens": 256, "batch_tokens": 128, "compute_dtype": "float32", "log_every": 1}
    heal(HealSettings(store=settings.store, target=str(settings.run), run=run, track=name, **options))
    assert [row.get("loss") for _, row in fake.rows] == [line.get("loss") for line in log_of(run)]
    assert fake.inits[0]["name"] == "healed"
    assert fake.finished == 1


def test_tensorboards_events_are_written(settings: TrainSettings) -> None:
    pytest.importorskip("tensorboard")
    train(change(settings, track="tensorboard"))
    assert list((Path(str(settings.run)) / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_anything_is_made(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(SettingsError, match=rf'--track {name} without .* pip install "lftpipe\[{name}\]"'):
        train(change(settings, track=name))
    assert not Path(str(settings.run)).exists()
