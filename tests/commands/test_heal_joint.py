"""`lftpipe heal` of a student of several parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from tiny_students import tokens
from training_runs import short_run, teacher_of, weights_of

from lftpipe import load_student, runs
from lftpipe.base.errors import SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, HealSettings
from lftpipe.families.attention import attention_context
from lftpipe.store import Store
from lftpipe.teacher.layers import load_rotary
from lftpipe.training.healing import HealingStudent

STEPS = 10


@pytest.fixture(scope="module", params=["neox", "llama"])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    teachers: dict[str, Path],
    text_folder: Path,
) -> tuple[Path, Path]:
    """A store, and a run of the blocks 0:1 and 2:3 of four layers."""
    workspace = tmp_path_factory.mktemp("joint")
    store = extracted(workspace, teachers[request.param], text_folder, logits=8, layers="all")
    given = {"objective": "fw", "walk_steps": 1, "solver": "euler", "block": "0:1,2:3", "joint": True}
    train(short_run(store, workspace, **given))
    return store, workspace / "run"


def healing(store: Path, target: Path, run: Path, **values: Any) -> HealSettings:
    given = {
        "store": store,
        "target": str(target),
        "tokens": STEPS * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "run": str(run),
        "adapter": "full",
        "log_every": 1,
        "evaluate_every": 5,
        "hold_back": 0.1,
        "learning_rate": 1e-3,
    }
    return HealSettings(**given | values)


def kl_of(store: Path, run: Path, out: Path) -> float:
    given = EvaluateSettings(store=store, runs=(str(run),), k=(1,), skips=(), out=out, force=True)
    return next(row["kl"] for row in evaluate(given)["rows"] if row["run"])


def changed_layers(run: Path) -> set[str]:
    """Numbers of the teacher's layers, and other parts of it, that a healed run has its own of."""
    names = [name.split(".") for name in weights_of(run) if name.startswith("teacher.")]
    return {parts[3] if parts[2] == "layers" else parts[2] for parts in names}


@pytest.mark.parametrize(
    "how",
    [
        {"train": "tail"},
        {"train": "student", "loss": "logits"},
        {"train": "tail", "adapter": "lora", "rank": 4},
    ],
)
def test_the_layers_between_the_parts_heal_too_and_every_form_agrees(
    trained: tuple[Path, Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    store, run = trained
    made = tmp_path / "healed"
    result = heal(healing(store, run, made, **how))
    assert (result["run"], result["shape"]) == (str(made), "0:1>flow, 2:3>flow")
    teacher = teacher_of(Store.open(store))
    assert changed_layers(made) == {"1", "3", teacher.family.final_norm_prefix.split(".")[-1]}
    assert kl_of(store, made, tmp_path / "r.json") < kl_of(store, run, tmp_path / "r.json")
    # Evaluated from the cache, healed in its own module, built as a transformers model: one function.
    ids = tokens(24, sequences=2)
    own = HealingStudent(runs.open_run(made), teacher, whole=True)
    student = load_student(made)
    places = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    with torch.inference_mode():
        states = student.base_model(ids).last_hidden_state
        embedded = student.get_input_embeddings()(ids)
        ours = own(embedded, attention_context(load_rotary(teacher), places))
        assert (ours - states).abs().max() < 1e-4
    exported = export(ExportSettings(runs=(str(made),), form="plain", out=tmp_path / "out"))
    assert exported["max_logit_difference"] < 1e-4


def test_what_was_healed_is_healed_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    store, run = trained
    heal(healing(store, run, tmp_path / "once", tokens=4 * CONTEXT))
    heal(healing(store, tmp_path / "once", tmp_path / "twice", tokens=4 * CONTEXT))
    once, twice = (runs.open_run(tmp_path / name) for name in ("once", "twice"))
    assert once.healed is not None
    assert twice.healed is not None
    assert twice.healed["before"]["run"] == once.healed["run"] == str(run)
    assert twice.train_tokens == once.train_tokens + 4 * CONTEXT


@pytest.mark.parametrize(
    ("block", "refused"), [("0:1,2:4", None), ("0:2,2:4", "--train tail for 0:2>1, 2:4>1 of 4 layers")]
)
def test_a_student_has_a_tail_where_a_layer_follows_any_part(
    stores: dict[str, Path], tmp_path: Path, block: str, refused: str | None
) -> None:
    store = stores["neox"]
    train(short_run(store, tmp_path, objective="regression", block=block, joint=True))
    given = healing(store, tmp_path / "run", tmp_path / "h", loss="tokens", tokens=CONTEXT)
    if refused is None:
        assert heal(given)["train_tokens"] == CONTEXT * 4
    else:
        with pytest.raises(SettingsError, match=refused):
            heal(given)
