"""What `lftpipe heal` begins with: every family, stores with little in them, weights that changed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from decoders import DECODERS, make_decoders
from tiny_students import tokens
from training_runs import log_of, short_run, teacher_of
from transformers import PreTrainedTokenizerFast

from lftpipe import runs
from lftpipe.base.errors import DivergenceError, RunError, SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.generate import generate
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, GenerateSettings, HealSettings
from lftpipe.store import Store
from lftpipe.student.assemble import build_student, load_model
from lftpipe.training import step as training_step


def healing(store: Path, folder: Path, **values: Any) -> HealSettings:
    given = {
        "store": store,
        "target": str(folder / "run"),
        "run": str(folder / "healed"),
        "tokens": 10 * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "evaluate_every": 5,
        "log_every": 5,
        "hold_back": 0.1,
        "learning_rate": 5e-3,
        "loss": "logits",
    }
    return HealSettings(**given | values)


@pytest.fixture
def trained(stores: dict[str, Path], tmp_path: Path) -> Path:
    train(short_run(stores["neox"], tmp_path, objective="regression"))
    return stores["neox"]


@pytest.fixture(scope="module")
def derived(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    text_folder: Path,
) -> Path:
    """A store without state 0 of a teacher whose family is read from its model."""
    root = tmp_path_factory.mktemp(request.param)
    teacher = make_decoders(root, [request.param], tokenizer)[request.param]
    return extracted(root / "workspace", teacher, text_folder, layers="1,3", attention=False)


@pytest.mark.parametrize(
    ("derived", "adapter"),
    [
        ("gpt2", "full"),
        ("mixtral", "lora"),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in DECODERS if name != "gpt2"),
        *(pytest.param(name, "lora", marks=pytest.mark.slow) for name in ("gpt2", "qwen2")),
    ],
    indirect=["derived"],
)
def test_a_healed_run_of_any_family_is_a_run(derived: Path, tmp_path: Path, adapter: str) -> None:
    train(short_run(derived, tmp_path, objective="regression"))
    heal(healing(derived, tmp_path, adapter=adapter, learning_rate=5e-3 if adapter == "lora" else 1e-3))
    scored = evaluate(
        EvaluateSettings(
            store=derived,
            runs=(str(tmp_path / "run"), str(tmp_path / "healed")),
            skips=(),
            out=tmp_path / "results.json",
        )
    )
    before, after = (next(row for row in scored["rows"] if row["run"] == name) for name in ("run", "healed"))
    assert after["kl"] < before["kl"]
    out = export(ExportSettings(runs=(str(tmp_path / "healed"),), form="plain", out=tmp_path / "out"))
    assert out["max_logit_difference"] < 1e-4
    student = build_student(teacher_of(Store.open(derived)), [runs.open_run(tmp_path / "healed")])
    ids = tokens(24, sequences=2)
    with torch.inference_mode():
        assert (load_model(tmp_path / "out")(ids).logits - student(ids).logits).abs().max() < 1e-4
    for target in ("healed", "out"):
        written = generate(GenerateSettings(target=str(tmp_path / target), prompt="a b", max_new_tokens=4))
        assert 0 < written["new_tokens"] <= 4


@pytest.mark.parametrize("derived", ["gpt2"], indirect=True)
def test_a_whole_student_begins_with_the_embedding_where_state_0_is_not_stored(
    derived: Path, tmp_path: Path
) -> None:
    """GPT-2's adds learned positions to the tokens'."""
    train(short_run(derived, tmp_path, objective="regression"))
    heal(healing(derived, tmp_path, train="student", adapter="full", learning_rate=1e-3))
    names = (str(tmp_path / "run"), str(tmp_path / "healed"))
    scored = evaluate(EvaluateSettings(store=derived, runs=names, skips=(), out=tmp_path / "results.json"))
    before, after = (next(row for row in scored["rows"] if row["run"] == name) for name in ("run", "healed"))
    assert after["kl"] < before["kl"]


def test_tokens_alone_are_enough_for_their_own_loss(
    trained: Path, teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    bare = extracted(tmp_path / "bare", teachers["neox"], text_folder, tokens_only=True)
    train(short_run(bare, tmp_path, objective="regression", run=str(tmp_path / "live"), from_teacher=True))
    heal(
        healing(bare, tmp_path, target=str(tmp_path / "live"), train="student", loss="tokens", adapter="full")
    )
    rows = [row["held_back_loss"] for row in log_of(tmp_path / "healed") if "held_back_loss" in row]
    assert min(rows[1:]) < rows[0]


def test_a_run_that_was_trained_anew_is_healed_anew(trained: Path, tmp_path: Path) -> None:
    heal(healing(trained, tmp_path))
    assert heal(healing(trained, tmp_path))["already_finished"]
    train(short_run(trained, tmp_path, objective="regression", seed=1, force=True))
    for resume in (False, True):
        with pytest.raises(RunError, match="healed weights = "):
            heal(healing(trained, tmp_path, resume=resume))
    assert not heal(healing(trained, tmp_path, force=True)).get("already_finished")


def test_a_path_may_be_written_in_another_way(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heal(healing(trained, tmp_path))
    monkeypatch.chdir(tmp_path)
    assert heal(healing(trained, tmp_path, target="./run"))["already_finished"]


def test_a_healing_that_diverged_goes_on_from_its_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training_step.loss_of

    def loss_of(run, batch):
        loss = real(run, batch)
        return loss * (math.nan if run.step == 6 and torch.is_grad_enabled() else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "loss_of", loss_of)
        with pytest.raises(DivergenceError, match=r"at step 6 of .*--resume with a lower --learning-rate"):
            heal(healing(trained, tmp_path, checkpoint_every=4))
    again = healing(trained, tmp_path, checkpoint_every=4, resume=True, learning_rate=1e-3)
    assert heal(again)["steps"] == 10


def test_a_healing_stops_where_nothing_is_gained_and_keeps_its_best(trained: Path, tmp_path: Path) -> None:
    """At a rate at which it only gets worse, what it began with is the best."""
    result = heal(
        healing(trained, tmp_path, adapter="full", learning_rate=0.1, evaluate_every=1, patience=3, ema=0.5)
    )
    assert result["steps"] == 3
    first, *others = (row["held_back_loss"] for row in log_of(tmp_path / "healed"))
    assert result["held_back_loss"] == first < min(others)
    with pytest.raises(SettingsError, match="--patience without --hold-back"):
        heal(healing(trained, tmp_path, run=str(tmp_path / "other"), patience=3, hold_back=0.0))
