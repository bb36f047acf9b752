"""Ordinary layers in place of a block: several of them, or one in a loop."""

from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from decoders import make_decoders
from tiny_students import save_run, tokens
from training_runs import change, log_of, short_run, teacher_of, weights_of
from transformers import PreTrainedTokenizerFast

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings
from lftpipe.store import Store
from lftpipe.student.assemble import build_student, load_model
from lftpipe.teacher.source import open_teacher
from lftpipe.training.estimator import parts


def test_parts_divide_the_block() -> None:
    assert parts((12, 27), 2) == [(12, 20), (20, 27)]
    assert parts((5, 8), 1) == [(5, 8)]
    assert parts((0, 6), 3) == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("depth", [2, 3])
def test_a_stack_starts_from_layers_of_the_block_and_learns(
    stores: dict[str, Path], tmp_path: Path, depth: int
) -> None:
    store = Store.open(stores["neox"])
    settings = short_run(store.path, tmp_path, objective="regression", block="0:4", depth=depth, tokens=1)
    train(change(settings, learning_rate=0.0, run=str(tmp_path / "start")))
    start = weights_of(tmp_path / "start")
    name = "layer.mlp.dense_4h_to_h.weight"
    for index, (first, _) in enumerate(parts((0, 4), depth)):
        source = f"gpt_neox.layers.{first}.mlp.dense_4h_to_h.weight"
        assert torch.equal(
            start[f"layers.{index}.{name}"], teacher_of(store).checkpoint.read([source])[source]
        )
    long = train(change(settings, tokens=12 * 4 * 32))
    results = evaluate(
        EvaluateSettings(
            store=store.path, runs=(str(tmp_path / "start"), long["run"]), skips=(), out=tmp_path / "r.json"
        )
    )
    before, after = (next(r for r in results["rows"] if r["run"] == name) for name in ("start", "run"))
    assert after["nmse"] < before["nmse"]
    assert after["nfe"] == depth


@pytest.mark.parametrize("joint", [False, True])
def test_each_block_may_have_a_depth_of_its_own(stores: dict[str, Path], tmp_path: Path, joint: bool) -> None:
    store = Store.open(stores["neox"])
    settings = short_run(store.path, tmp_path, objective="distil", block="0:1,1:4", joint=joint)
    made = train(change(settings, depth=(1, 2))).runs
    opened = [runs.open_run(Path(each.run)) for each in made]
    assert [part.depth for run in opened for part in run.parts] == [1, 2]
    recorded = [runs.read_settings(run.path)[0]["depth"] for run in opened]
    assert recorded == ([[1, 2]] if joint else [1, 2])
    assert all(run.already_finished for run in train(change(settings, depth=(1, 2))).runs)
    named = tuple(str(run.path) for run in opened)
    out = export(ExportSettings(runs=named, form="plain", out=tmp_path / "out"))
    assert out["layers"] == teacher_of(store).num_layers - 1
    with pytest.raises(SettingsError, match="--depth 2 for a block of 1 layers"):
        train(change(settings, depth=(2, 1), run=str(tmp_path / "other")))


def test_the_mean_of_the_block_is_a_start(stores: dict[str, Path], tmp_path: Path) -> None:
    store = Store.open(stores["llama"])
    train(short_run(store.path, tmp_path, objective="distil", init="mean", tokens=1, learning_rate=0.0))
    names = [f"model.layers.{index}.mlp.down_proj.weight" for index in (1, 2)]
    both = teacher_of(store).checkpoint.read(names)
    assert torch.allclose(
        weights_of(tmp_path / "run")["layer.layer.mlp.down_proj.weight"],
        torch.stack([*both.values()]).mean(0),
    )


@pytest.mark.parametrize("name", ["neox", "llama"])
@pytest.mark.parametrize(("depth", "loops"), [(2, 1), (1, 3), (2, 2)])
@torch.inference_mode()
def test_every_stack_has_an_exact_plain_form_and_a_cache(
    teachers: dict[str, Path], tmp_path: Path, name: str, depth: int, loops: int
) -> None:
    teacher = open_teacher(str(teachers[name]), tmp_path)
    part = {"kind": "layers", "depth": depth, "loops": loops}
    run = save_run(tmp_path / "run", teacher, (1, 3), solver="euler", walk_steps=1, part=part)
    out = export(
        ExportSettings(workspace=tmp_path, runs=(str(run.path),), form="plain", out=tmp_path / "out")
    )
    assert out["layers"] == 2 + depth * loops
    student, plain, ids = build_student(teacher, [run]), load_model(tmp_path / "out"), tokens(20)
    assert (plain(ids).logits - student(ids).logits).abs().max() < 1e-4
    first = student(ids[:, :12], use_cache=True)
    rest = student(ids[:, 12:], past_key_values=first.past_key_values)
    assert (rest.logits - student(ids).logits[:, 12:]).abs().max() < 1e-4
    latent = ExportSettings(workspace=tmp_path, runs=(str(run.path),), out=tmp_path / "latent")
    export(latent)
    assert torch.equal(load_model(tmp_path / "latent")(ids).logits, student(ids).logits)


def test_a_looped_layer_is_named_after_its_loops_and_resumes(stores: dict[str, Path], tmp_path: Path) -> None:
    settings = short_run(stores["neox"], tmp_path, objective="looped", walk_steps=2)
    train(settings)
    run = runs.open_run(tmp_path / "run")
    assert run.evaluations("euler", 1) == 2
    assert train(settings)["already_finished"]


def test_distil_records_its_loss(stores: dict[str, Path], tmp_path: Path) -> None:
    train(short_run(stores["neox"], tmp_path, objective="distil"))
    recorded, _ = runs.read_settings(tmp_path / "run")
    assert recorded["objective"] == "distil"
    assert "logits" in recorded["loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "fw", "depth": 2}, "--depth 2 with --objective fw"),
        ({"objective": "regression", "depth": 2}, "fewer layers than are replaced"),
        ({"objective": "regression", "depth": (1, 2)}, "--depth 1,2 for one block"),
        ({"objective": "regression", "depth": (1, 2, 1), "block": "0:1,1:4"}, "--depth 1,2,1 for 2 blocks"),
        ({"objective": "regression", "depth": 2, "block": "0:4", "init": "readout"}, "--init readout"),
    ],
)
def test_a_depth_without_sense_is_refused(
    stores: dict[str, Path], tmp_path: Path, given: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(change(short_run(stores["neox"], tmp_path), **given))


@pytest.mark.parametrize("objective", ["regression", "distil"])
def test_layers_of_two_kinds_are_trained_as_they_are_scored(
    tokenizer: PreTrainedTokenizerFast, text_folder: Path, tmp_path: Path, objective: str
) -> None:
    """Gemma's layers are windowed or not: in a block's place all are of the kind of its first."""
    teacher = make_decoders(tmp_path, ["gemma3_text"], tokenizer)["gemma3_text"]
    few = {"layers": "0,4", "validation_tokens": 4 * CONTEXT}  # as many as training looks at
    store = extracted(tmp_path / "workspace", teacher, text_folder, **few)
    settings = short_run(store, tmp_path, objective=objective, block="0:4", depth=3, evaluate_every=12)
    train(settings)
    run = str(tmp_path / "run")
    scored = evaluate(EvaluateSettings(store=store, runs=(run,), skips=(), out=tmp_path / "r.json"))
    row = next(row for row in scored["rows"] if row["run"])
    assert row["nmse"] == pytest.approx(log_of(run)[-1]["validation_nmse"], rel=1e-3)
    out = export(ExportSettings(runs=(run,), form="plain", out=tmp_path / "out"))
    assert out["max_logit_difference"] < 1e-4


def test_layers_with_other_tensors_are_refused(
    tokenizer: PreTrainedTokenizerFast, text_folder: Path, tmp_path: Path
) -> None:
    teacher = make_decoders(tmp_path, ["rwkv"], tokenizer)["rwkv"]  # its first layer has a norm more
    store = extracted(tmp_path / "workspace", teacher, text_folder, layers="0,4", attention=False)
    with pytest.raises(SettingsError, match="layers with the same tensors"):
        train(short_run(store, tmp_path, objective="regression", block="0:4", depth=2))
    assert not (tmp_path / "run").exists()
