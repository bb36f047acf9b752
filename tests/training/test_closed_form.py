"""Baselines without steps: what each fits, that it is a run like any other, and what it refuses."""

from pathlib import Path

import pytest
import torch
from conftest import extracted
from decoders import make_decoders
from tiny_students import tokens
from training_runs import change, short_run, teacher_of, weights_of
from transformers import PreTrainedTokenizerFast

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings
from lftpipe.store import Store
from lftpipe.student.assemble import build_student, load_model, load_teacher, without_layers
from lftpipe.training.closed_form import hadamard

RIVALS = ("skip", "linear", "replaceme", "linearpatch")


def state(store: Store, layer: int, array: str = "hidden") -> torch.Tensor:
    rows = range(store.num_sequences("train"))
    return torch.from_numpy(store.read("train", layer, rows, array=array)).float()


@pytest.fixture(scope="module")
def stores_of_three(
    stores: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    text_folder: Path,
) -> dict[str, Path]:
    """One of a teacher whose maps are stored transposed, too."""
    root = tmp_path_factory.mktemp("gpt2")
    teacher = make_decoders(root, ["gpt2"], tokenizer)["gpt2"]
    return stores | {"gpt2": extracted(root / "workspace", teacher, text_folder)}


@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
def test_every_baseline_is_scored_and_replaceme_beats_skipping(
    stores_of_three: dict[str, Path], tmp_path: Path, family: str
) -> None:
    for objective in RIVALS:
        train(
            short_run(stores_of_three[family], tmp_path, objective=objective, run=str(tmp_path / objective))
        )
    named = tuple(str(tmp_path / objective) for objective in RIVALS)
    result = evaluate(
        EvaluateSettings(store=stores_of_three[family], runs=named, skips=(), out=tmp_path / "r.json")
    )
    rows = {row["run"]: row for row in result["rows"] if row["run"]}
    skipped = next(row for row in result["rows"] if row["method"] == "skip layers 1-2")
    assert rows["skip"]["kl"] == pytest.approx(skipped["kl"], rel=1e-6)
    assert rows["skip"]["nfe"] == 0
    assert rows["skip"]["parameters"] == skipped["parameters"]
    assert rows["replaceme"]["parameters"] == skipped["parameters"]
    assert rows["replaceme"]["block"] == "0:3"
    assert rows["replaceme"]["nmse"] < skipped["nmse"]
    assert rows["linear"]["nmse"] < skipped["nmse"]


def test_replaceme_is_the_least_squares_map_of_the_mlp_output(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Store.open(stores["neox"])
    train(short_run(store.path, tmp_path, objective="replaceme"))
    before, x_0, x_1 = (state(store, layer) for layer in (0, 1, 3))
    attention = state(store, 0, "attention")
    mlp = (x_0 - before - attention).flatten(0, 1).double()
    weight = x_1.flatten(0, 1).double().norm(dim=-1, keepdim=True).reciprocal()
    inputs = torch.cat([mlp, torch.ones(len(mlp), 1)], dim=-1)
    rest = (x_0 - x_1).flatten(0, 1).double() - mlp  # Y - h[n]
    best = torch.linalg.lstsq(weight * inputs, weight * -rest).solution
    own = weights_of(tmp_path / "run")
    kept = teacher_of(store).checkpoint.read(["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"])
    expected = best[:-1].T.float() @ next(iter(kept.values()))
    assert torch.allclose(own["layer.layer.mlp.dense_4h_to_h.weight"], expected, rtol=1e-2, atol=1e-3)


def test_linearpatch_gives_rotated_channels_the_size_of_the_blocks_end(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Store.open(stores["neox"])
    train(short_run(store.path, tmp_path, objective="linearpatch", tokens=10**6))
    rotation = hadamard(32)
    weight = weights_of(tmp_path / "run")["linear.weight"] + torch.eye(32)
    scale = rotation.T @ weight @ rotation
    assert torch.allclose(scale, torch.diag(scale.diagonal()), atol=1e-5)
    before, after = ((state(store, layer) @ rotation).abs().mean(1) for layer in (1, 3))
    assert torch.allclose(scale.diagonal(), (after / before).mean(0), rtol=1e-4)


@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
@torch.inference_mode()
def test_plain_exports_of_skip_and_replaceme_are_exact(
    stores_of_three: dict[str, Path], tmp_path: Path, family: str
) -> None:
    teacher = teacher_of(Store.open(stores_of_three[family]))
    ids = tokens(24, sequences=2)
    for objective, layers in (("skip", 2), ("replaceme", 2)):
        run = tmp_path / objective
        train(short_run(stores_of_three[family], tmp_path, objective=objective, run=str(run)))
        exported = export(
            ExportSettings(workspace=tmp_path, runs=(str(run),), form="plain", out=tmp_path / f"{run}-plain")
        )
        assert exported["layers"] == layers
        plain = load_model(Path(exported["out"]))
        student = build_student(teacher, [runs.open_run(run)])
        assert (plain(ids).logits - student(ids).logits).abs().max() < 1e-4
    skipped = without_layers(load_teacher(teacher), teacher, [(1, 3)])
    student = build_student(teacher, [runs.open_run(tmp_path / "skip")])
    assert torch.equal(student(ids).logits, skipped(ids).logits)


def test_a_linear_patch_has_no_plain_form(stores: dict[str, Path], tmp_path: Path) -> None:
    train(short_run(stores["neox"], tmp_path, objective="linearpatch"))
    with pytest.raises(RunError, match="a linear map is none of the family"):
        export(ExportSettings(workspace=tmp_path, runs=(str(tmp_path / "run"),), form="plain"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "replaceme", "block": "0:2"}, "a layer before the block"),
        ({"objective": "skip", "loss": "regression"}, "--loss with --objective skip"),
        ({"objective": "replaceme", "init": "mean"}, "--init mean with --objective replaceme"),
        (
            {"objective": "linearpatch", "condition": "source"},
            "--condition source with --objective linearpatch",
        ),
        ({"objective": "linear", "depth": 2}, "--depth 2 with --objective linear"),
        ({"objective": "skip", "joint": True}, "--joint with --objective skip"),
    ],
)
def test_what_contradicts_is_refused(
    stores: dict[str, Path], tmp_path: Path, given: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(change(short_run(stores["neox"], tmp_path), **given))


def test_replaceme_says_what_a_store_lacks(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    from conftest import extracted

    store = extracted(tmp_path, teachers["neox"], text_folder, layers="1,3", attention=False)
    with pytest.raises(SettingsError, match="extract with --layers all --attention"):
        train(short_run(store, tmp_path, objective="replaceme"))
