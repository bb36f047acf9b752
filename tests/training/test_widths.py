"""Layers with fewer channels, and students of many parts: their start, their training, their exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from tiny_students import tokens
from training_runs import assert_same_weights, log_of, short_run, stop_before, teacher_of, weights_of

import lftpipe
from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.shape import Part, channels_of, shape_text
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, TrainSettings
from lftpipe.data.batches import BatchFields, BatchReader
from lftpipe.families.layer_probe import weight_of
from lftpipe.families.narrow import mlp_maps, narrow
from lftpipe.store import Store
from lftpipe.teacher.layers import load_layer
from lftpipe.training.run import TrainedPart
from lftpipe.training.starts import Moments, Start


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teachers of the tests have but 64 and 48 channels."""
    monkeypatch.setattr("lftpipe.base.shape.CHANNELS", 8)


@pytest.fixture(scope="module", params=[pytest.param("neox", marks=pytest.mark.slow), "llama"])
def store(request: pytest.FixtureRequest, stores: dict[str, Path]) -> Path:
    return stores[request.param]


def each(store: Path, folder: Path, **values: Any) -> TrainSettings:
    given = {"block": "each", "width": 0.5, "objective": "distil", "learning_rate": 1e-3}
    return short_run(store, folder, **given | values)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all layers at half of their width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lftpipe.base.shape.CHANNELS", 8)
        return Path(train(each(store, tmp_path_factory.mktemp("widths")))["run"])


def test_channels_are_a_multiple_of_64_and_no_more_than_the_teachers(monkeypatch):
    monkeypatch.undo()
    widths = [0.01, 0.25, 0.5, 0.51, 0.75, 1.0]
    assert [channels_of(width, 1536) for width in widths] == [64, 384, 768, 832, 1152, 1536]
    assert [channels_of(width, 48) for width in widths] == [48] * 6


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([Part(4, 11, "layers", depth=2), Part(12, 20, "layer")], "4:11>2, 12:20>1"),
        ([Part(0, 1, "layer", width=0.5), Part(1, 2, "layer", width=0.5)], "each@0.5"),
        ([Part(0, 1, "layer"), Part(1, 2, "layer", width=0.25)], "0:1>1, 1:2>1@0.25"),
        ([Part(0, 2, "skip")], "0:2>skip"),
        ([Part(0, 2, "layers", loops=3)], "0:2>1x3"),
    ],
)
def test_a_shape_is_shown_in_short(parts: list[Part], shown: str) -> None:
    assert shape_text(parts, 2) == shown


def test_the_channels_that_stay_give_what_they_gave(store: Path) -> None:
    teacher = teacher_of(Store.open(store))
    whole, part = load_layer(teacher, 1), load_layer(teacher, 1)
    maps = mlp_maps(whole)
    keep = torch.randperm(maps.channels)[: maps.channels // 2].sort().values
    narrow(part, 0.5, keep)
    gone = torch.ones(maps.channels, dtype=torch.bool)
    gone[keep] = False
    with torch.no_grad():
        weight_of(whole.layer.get_submodule(maps.output))[:, gone] = 0
        x = torch.randn(2, 5, teacher.width)
        torch.testing.assert_close(part.mlp(x), whole.mlp(x))


def test_the_fitted_output_map_is_nearer_than_plain_selection(store: Path) -> None:
    opened = Store.open(store)
    teacher = teacher_of(opened)
    layer = load_layer(teacher, 1)
    batch = BatchReader(opened, teacher, "cpu").read("train", range(24), BatchFields((1,)))
    moments = Moments(layer)
    with torch.no_grad():
        moments.add(batch, batch.states[1])
    count = moments.weight.shape[1] // 2

    def error(start: Start) -> float:
        """Of the map on the moments: what the fit minimises."""
        lost = torch.zeros_like(moments.gram[: teacher.width])
        lost = torch.zeros(teacher.width, len(moments.gram), dtype=torch.float64)
        lost[:, : moments.weight.shape[1]] = moments.weight.double()
        lost[:, start.keep] -= start.weight.double()
        if moments.bias is not None:
            assert start.bias is not None
            lost[:, -1] = (moments.bias - start.bias).double()
        return ((lost @ moments.gram) * lost).sum().item()

    plain, fitted = moments.selected(count), moments.fitted(count)
    assert len(fitted.keep) == len(plain.keep) == count
    assert error(fitted) < 0.8 * error(plain)
    everything = moments.fitted(moments.weight.shape[1])
    torch.testing.assert_close(everything.weight, moments.weight, rtol=1e-3, atol=1e-4)


def test_a_fit_that_is_worse_at_some_positions_gives_way_to_plain_selection(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Moments.fitted

    def nothing(moments: Moments, count: int) -> Start:
        found = real(moments, count)
        return found._replace(weight=torch.zeros_like(found.weight))

    monkeypatch.setattr(Moments, "fitted", nothing)
    given = each(store, tmp_path, block="1:2", tokens=1, learning_rate=0.0)
    name = mlp_maps(load_layer(teacher_of(Store.open(store)), 1)).output
    start = weights_of(train(given)["run"])[f"layer.layer.{name}.weight"]
    own = load_layer(teacher_of(Store.open(store)), 1).layer.get_submodule(name).weight
    assert isinstance(own, torch.Tensor)
    assert all(any(torch.equal(column, other) for other in own.T) for column in start.T)


def test_a_student_of_narrow_layers_is_one_run_and_every_form_of_it_agrees(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    manifest = json.loads((trained / runs.MANIFEST).read_text())
    assert (manifest["shape"], manifest["loss"]) == ("each@0.5", "local@0.8/logits")
    given = EvaluateSettings(store=store, runs=(str(trained),), k=(1,), out=tmp_path / "r.json")
    row = next(row for row in evaluate(given)["rows"] if row["run"])
    teacher = teacher_of(Store.open(store))
    assert (row["shape"], row["layers"]) == ("each@0.5", teacher.num_layers)
    plain = export(ExportSettings(runs=(str(trained),), form="plain", out=tmp_path / "plain"))
    assert plain["max_logit_difference"] < 1e-5
    assert plain["parameters"] == row["parameters"] == row["bytes"] // 4
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["intermediate_size"] == teacher.config.intermediate_size // 2
    assert config["model_type"] == teacher.config.model_type
    student, ordinary = lftpipe.load_student(trained), lftpipe.load_student(tmp_path / "plain")
    with torch.inference_mode():
        torch.testing.assert_close(student(tokens(16)).logits, ordinary(tokens(16)).logits)


@pytest.mark.slow
def test_several_widths_have_a_latent_flow_form_alone(store: Path, tmp_path: Path) -> None:
    given = {"block": "0:1,2:4", "width": (1.0, 0.5), "joint": True, "objective": "distil", "depth": 1}
    run = train(short_run(store, tmp_path, **given))["run"]
    assert runs.open_run(Path(run)).shape == "0:1>1, 2:4>1@0.5"
    made = export(ExportSettings(runs=(run,), out=tmp_path / "out"))
    loaded, exported = lftpipe.load_student(run), lftpipe.load_student(made["out"])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens(16)).logits, exported(tokens(16)).logits)
    with pytest.raises(RunError, match="MLPs of several widths / expected: one width"):
        export(ExportSettings(runs=(run,), form="plain", out=tmp_path / "plain"))


def test_a_narrow_flow_starts_near_its_layer_and_learns(store: Path, tmp_path: Path) -> None:
    given = {"block": "1:2", "width": 0.5, "objective": "fw", "solver": "euler", "walk_steps": 2}
    run = train(short_run(store, tmp_path, **given, tokens=40 * 4 * CONTEXT))["run"]
    assert runs.open_run(Path(run)).shape == "1:2>flow@0.5"
    losses = [row["loss"] for row in log_of(run)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_no_part_learns_from_another_on_its_own_states(store: Path, tmp_path: Path) -> None:
    given = {"width": 0.5, "objective": "regression", "clip": 0.0, "tokens": 4 * 4 * CONTEXT}
    together = train(short_run(store, tmp_path, block="0:1,1:3", joint=True, loss="local", **given))["run"]
    alone = train(short_run(store, tmp_path, block="1:3", run=str(tmp_path / "alone"), **given))["run"]
    whole, part = weights_of(together), weights_of(alone)
    torch.testing.assert_close({name: whole[f"parts.1.{name}"] for name in part}, part)


def test_parts_that_learned_alone_are_fitted_to_follow_one_another(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"learning_rate": 0.0, "log_every": 1}
    joined = log_of(train(each(store, tmp_path, run=str(tmp_path / "joined"), **given))["run"])
    monkeypatch.setattr("lftpipe.training.starts.follow", lambda *_: None)
    apart = log_of(train(each(store, tmp_path, run=str(tmp_path / "apart"), **given))["run"])
    half = len(apart) // 2
    assert [row["nmse"] for row in joined[:half]] == [row["nmse"] for row in apart[:half]]
    assert sum(row["nmse"] for row in joined[half:]) < sum(row["nmse"] for row in apart[half:])


def test_a_fit_that_takes_the_stream_further_away_is_taken_back(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: object, one: TrainedPart, *__: object) -> None:
        with torch.no_grad():
            for weight in one.flow.parameters():
                weight.mul_(3)

    monkeypatch.setattr("lftpipe.training.starts._fit", spoil)
    given = {"learning_rate": 0.0}
    spoiled = weights_of(train(each(store, tmp_path, run=str(tmp_path / "spoiled"), **given))["run"])
    monkeypatch.setattr("lftpipe.training.starts.follow", lambda *_: None)
    torch.testing.assert_close(
        spoiled, weights_of(train(each(store, tmp_path, run=str(tmp_path / "apart"), **given))["run"])
    )


def test_a_killed_run_of_many_parts_ends_with_the_same_weights(
    store: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(each(store, tmp_path))
    assert_same_weights(train(each(store, tmp_path, resume=True))["run"], trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0.0}, r"--width 0.0 / expected: more than 0"),
        ({"width": 1.5}, "--width 1.5 / expected: at most 1"),
        ({"block": "0:1,2:3", "width": (1.0, 0.5, 0.5)}, "--width 1,0.5,0.5 for 2 blocks"),
        ({"objective": "skip", "block": "1:2"}, "--width 0.5 with --objective skip"),
        ({"init": "mean", "block": "1:2"}, "--width 0.5 with --init mean"),
    ],
)
def test_widths_that_make_no_sense_are_refused(
    stores: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(each(stores["neox"], tmp_path, **changes))


def test_a_store_without_the_states_of_every_layer_says_how_to_add_them(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    store = extracted(tmp_path, teachers["neox"], text_folder, layers="0,4", attention=False)
    with pytest.raises(SettingsError, match=r"block 0:1, which needs state 1 .* extract with --layers"):
        train(each(store, tmp_path))
