"""What a GPU would do, held without one: steps and batches run on torch's `meta` device and never wait.

A tensor of `meta` has no values: whoever asks for one raises, and so does whoever mixes it with a tensor of
another device. What passes here therefore neither waits for a card nor leaves a tensor behind.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operations import step_of
from training_runs import short_run, teacher_of

from lftpipe.config.settings import HealSettings, TrainSettings
from lftpipe.data.batches import BatchFields, BatchReader, make_batch
from lftpipe.evaluation.predictors import run_predictors, teacher_predictor
from lftpipe.evaluation.scoring import Measured, _compare
from lftpipe.runs import open_run
from lftpipe.store import Store
from lftpipe.teacher.source import open_teacher
from lftpipe.teacher.tail import Tail
from lftpipe.teacher.trunk import Head, Trunk, compute_batch
from lftpipe.training import TrainingRun
from lftpipe.training.healing import HealingRun
from lftpipe.training.step import take_step

OBJECTIVES: list[dict[str, Any]] = [
    {"objective": "fw"},
    {"objective": "fw", "walk_times": "mixed", "solver": "midpoint"},
    {"objective": "fw", "condition": "step"},
    {"objective": "sfm", "loss_scale": "none"},
    {"objective": "hybrid", "loss_scale": "channel"},
    {"objective": "regression", "loss_scale": "norm", "ema": 0.9},
    {"objective": "trajectory"},
    {"objective": "looped"},
    {"objective": "distil"},
    {"objective": "regression", "loss": "logits"},
    {"objective": "fw", "loss": "branches"},
    {"objective": "regression", "loss": "top-logits"},
    {"objective": "regression", "loss": "sampled-logits"},
]


def on_meta(settings: TrainSettings) -> TrainSettings:
    """The command line takes no such device."""
    object.__setattr__(settings, "device", "meta")
    return settings


class Autocast(torch.autocast):
    """There is no such thing on `meta`, where nothing is computed."""

    def __init__(self, device_type: str, *given: Any, **named: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *given, **named)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, without fused kernels of the optimiser: there are none for it."""
    real = torch.optim.AdamW.__init__

    def init(self: Any, *given: Any, fused: bool, **named: Any) -> None:
        real(self, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", init)
    monkeypatch.setattr(torch, "autocast", Autocast)
    return "meta"


def looks_of_a_processor(values: dict[str, Any]) -> int:
    """At what is no GPU's: a number of steps that it drew, or how many tokens, to spare itself the rest."""
    return (values.get("walk_times") == "mixed") + (values.get("loss") == "sampled-logits")


def run_of(store: Path, folder: Path, device: str, *blocks: tuple[int, int], **values: Any) -> TrainingRun:
    opened = Store.open(store)
    settings = short_run(store, folder, learning_rate=1e-3, **values)
    if device == "meta":
        settings = on_meta(settings)
    return TrainingRun(folder / "run", settings, opened, teacher_of(opened), blocks or [(1, 3)])


def devices_of(run: TrainingRun) -> set[str]:
    tensors = [*run.flow.state_dict().values(), *run.weights.state().values()]
    return {each.device.type for each in tensors if isinstance(each, torch.Tensor)}


@pytest.mark.parametrize("values", OBJECTIVES, ids=lambda each: "-".join(map(str, each.values())))
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_of_each_objective_runs_on_the_meta_device(
    store_with_logits, tmp_path, values, optimizer, meta
):
    run = run_of(store_with_logits, tmp_path, meta, optimizer=optimizer, **values)
    batches = run.reader.shuffled(run.fields, run.order, 0)
    for _ in range(2):
        take_step(run, next(batches), look=False)
    assert run.step == 2
    assert devices_of(run) == {"meta"}


@pytest.mark.parametrize("loss", ["regression", "local", "logits"])
def test_students_of_several_parts_and_the_live_teacher_step_on_the_meta_device(
    store_with_logits, tmp_path, meta, loss
):
    values = {"objective": "regression", "loss": loss, "from_teacher": True}
    run = run_of(store_with_logits, tmp_path, meta, (0, 1), (2, 3), **values)
    take_step(run, next(run.reader.shuffled(run.fields, run.order, 0)), look=False)
    assert devices_of(run) == {"meta"}


@pytest.fixture(scope="module")
def trained(store_with_logits, tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    run = run_of(store_with_logits, folder, "cpu", tokens=4 * 32)
    take_step(run, next(run.reader.shuffled(run.fields, run.order, 0)))
    run.folder.mkdir()
    run.finish()
    return run.folder


def healing_of(trained: Path, store: Path, folder: Path, device: str, **values: Any) -> HealingRun:
    opened = Store.open(store)
    given = {"store": store, "target": str(trained), "learning_rate": 1e-3, "compute_dtype": "float32"}
    settings = HealSettings(**given, tokens=8 * 32, batch_tokens=4 * 32, **values)
    object.__setattr__(settings, "device", device)
    return HealingRun(folder / "healed", settings, open_run(trained), opened, teacher_of(opened))


HEALINGS: list[dict[str, Any]] = [
    {"loss": "tokens", "train": "student", "adapter": "lora"},
    {"loss": "logits", "train": "tail", "adapter": "full"},
    {"loss": "top-logits", "train": "tail", "adapter": "lora"},
    {"loss": "sampled-logits", "train": "student", "adapter": "full"},
]


@pytest.mark.parametrize("values", HEALINGS, ids=lambda each: "-".join(each.values()))
def test_a_step_of_healing_runs_on_the_meta_device(trained, store_with_logits, tmp_path, values, meta):
    run = healing_of(trained, store_with_logits, tmp_path, meta, **values)
    step_of(run)
    assert {each.device.type for each in run.module.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("values", HEALINGS, ids=lambda each: "-".join(each.values()))
def test_a_step_of_healing_waits_for_nothing(trained, store_with_logits, tmp_path, values):
    waits = step_of(healing_of(trained, store_with_logits, tmp_path, "cpu", **values)).waits
    assert len(waits) == looks_of_a_processor(values)


def test_an_evaluation_batch_runs_on_the_meta_device(store_with_logits, trained, meta):
    store = Store.open(store_with_logits)
    teacher = teacher_of(store)
    predictors = run_predictors(open_run(trained), (1, 2), teacher, meta)
    measured = [Measured(one) for one in (teacher_predictor(teacher), *predictors)]
    batch = BatchReader(store, teacher, meta).read("validation", range(3), BatchFields((1, 3, 4)))
    with torch.inference_mode():
        tail = Tail(teacher, 1).to(meta)
        for n in (3, 4):
            list(_compare(measured, [measured[0].logits], tail, batch, n))
    assert {each.device.type for one in measured for each in one.logits._sums} == {meta}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["neox", "llama"])
def test_an_extraction_batch_runs_on_the_meta_device(teachers, name, packed, meta):
    teacher = open_teacher(str(teachers[name]), Path("unused"))
    trunk, head = Trunk(teacher, 4, torch.bfloat16, meta), Head(teacher, 5, meta)
    document = np.zeros((3, 32), np.int32)
    document[:, 20:] = packed
    batch = make_batch(np.ones((3, 32), np.int32), document, torch.device(meta))
    stored: list[torch.Tensor] = []
    compute_batch(trunk, head, batch.tokens, batch.visible_places, lambda *given: stored.append(given[2]))
    assert len(stored) == 5 + 4 + 3
    assert {each.device.type for each in stored} == {"meta"}


@pytest.mark.parametrize("values", OBJECTIVES, ids=lambda each: "-".join(map(str, each.values())))
def test_a_step_waits_for_nothing(store_with_logits, tmp_path, values):
    waits = step_of(run_of(store_with_logits, tmp_path, "cpu", **values)).waits
    assert len(waits) == looks_of_a_processor(values)
