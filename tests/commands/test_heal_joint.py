"""`lftpipe heal` of a student of several flow layers: healed as one, into runs that stay together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, extracted
from tiny_students import tokens
from training_runs import log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import load_student, runs
from lftpipe.base.errors import RunError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.heal import heal, summary
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, HealSettings
from lftpipe.families.attention import attention_context
from lftpipe.store import Store
from lftpipe.teacher.layers import load_rotary
from lftpipe.training.healing import HealingStudent

STEPS = 10
PARTS = ("run-0-1", "run-2-3")


@pytest.fixture(scope="module", params=["neox", "llama"])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    teachers: dict[str, Path],
    text_folder: Path,
) -> tuple[Path, Path]:
    """A store, and a folder with jointly trained runs of the blocks 0:1 and 2:3 of four layers."""
    workspace = tmp_path_factory.mktemp("joint")
    store = extracted(workspace, teachers[request.param], text_folder, logits=8, layers="all")
    train(
        short_run(store, workspace, objective="fw", walk_steps=1, solver="euler", block="0:1,2:3", joint=True)
    )
    return store, workspace


@pytest.fixture
def folder(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the runs, for one test."""
    for name in PARTS:
        shutil.copytree(trained[1] / name, tmp_path / name)
    return tmp_path


def healing(store: Path, folder: Path, **values: Any) -> HealSettings:
    given = {
        "store": store,
        "target": str(folder / PARTS[1]),
        "tokens": STEPS * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "run": str(folder / "healed"),
        "adapter": "full",
        "log_every": 1,
        "evaluate_every": 5,
        "checkpoint_every": 4,
        "hold_back": 0.1,
        "learning_rate": 1e-3,
    }
    return HealSettings(**given | values)


def scores(store: Path, folder: Path, *names: str, **values: Any) -> list[dict[str, Any]]:
    named = tuple(str(folder / name) for name in names)
    given = EvaluateSettings(
        store=store, runs=named, k=(1,), skips=(), out=folder / "r.json", force=True, **values
    )
    return [row for row in evaluate(given)["rows"] if row["run"]]


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
def test_a_joint_student_is_healed_as_one_and_every_form_of_it_agrees(
    trained: tuple[Path, Path], folder: Path, how: dict[str, Any]
) -> None:
    store = trained[0]
    result = heal(healing(store, folder, **how))
    made = [folder / "healed-0-1", folder / "healed-2-3"]
    assert result["joint"] == [str(run) for run in made]
    assert (result["run"], result["healed"]) == (str(made[0]), str(folder / PARTS[0]))
    assert "evaluate" in str(summary(result))
    # Each run keeps what follows its block, up to the next one.
    teacher = teacher_of(Store.open(store))
    assert changed_layers(made[0]) == {"1"}
    assert changed_layers(made[1]) == {"3", teacher.family.final_norm_prefix.split(".")[-1]}
    (before,), (after,) = scores(store, folder, PARTS[0]), scores(store, folder, "healed-2-3")
    assert after["kl"] < before["kl"]
    assert (after["run"], after["block"]) == ("healed-0-1 + healed-2-3", "0:1,2:3")
    assert after["parameters"] == before["parameters"]
    # Evaluated from the cache, healed in its own module, built as a transformers model: one function.
    ids = tokens(24, sequences=2)
    own = HealingStudent(runs.open_student(made[0]), teacher, whole=True)
    student = load_student(made[1])
    places = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    with torch.inference_mode():
        states = student.base_model(ids).last_hidden_state
        embedded = student.get_input_embeddings()(ids)
        ours = own(embedded, attention_context(load_rotary(teacher), places))
        assert (ours - states).abs().max() < 1e-4
    exported = export(ExportSettings(runs=(str(made[0]),), form="plain", out=folder / "out"))
    assert exported["max_logit_difference"] < 1e-4
    assert exported["runs"] == [str(run) for run in made]


def test_healed_runs_say_what_they_are_of_and_are_healed_again(
    trained: tuple[Path, Path], folder: Path
) -> None:
    store = trained[0]
    heal(healing(store, folder, run=None, tokens=4 * CONTEXT))  # named after the store's runs, beside it
    beside = store.parent / "runs"
    names = [f"{name}-healed" for name in PARTS]
    again = heal(healing(store, folder, target=str(beside / names[1]), tokens=4 * CONTEXT))
    for number, name in enumerate(names):
        manifest = json.loads((beside / name / runs.MANIFEST).read_text())
        assert manifest["joint"] == names
        assert manifest["healed"]["run"] == str(folder / PARTS[number])
        twice = json.loads((Path(again["joint"][number]) / runs.MANIFEST).read_text())
        assert twice["healed"]["before"]["run"] == str(folder / PARTS[number])
        assert twice["train_tokens"] == manifest["train_tokens"] + 4 * CONTEXT
        shutil.rmtree(beside / name)


def test_a_healed_part_without_its_others_is_refused(trained: tuple[Path, Path], folder: Path) -> None:
    store = trained[0]
    heal(healing(store, folder, tokens=4 * CONTEXT))
    with pytest.raises(RunError, match="by their names: healed-0-1, healed-2-3"):
        scores(store, folder, "healed-0-1", PARTS[0], together=True)
    (folder / "healed-0-1").rename(folder / "elsewhere")
    for refused in (
        lambda: load_student(folder / "healed-2-3"),
        lambda: export(ExportSettings(runs=(str(folder / "healed-2-3"),), out=folder / "out")),
        lambda: scores(store, folder, "healed-2-3"),
        lambda: heal(healing(store, folder, target=str(folder / "healed-2-3"), run=str(folder / "new"))),
    ):
        with pytest.raises(RunError, match="by their names: healed-0-1, healed-2-3"):
            refused()


@pytest.mark.parametrize("killed_at", ["a step", "the second manifest"])
def test_a_killed_healing_of_a_joint_student_ends_with_the_same_bits(
    trained: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    store = trained[0]
    heal(healing(store, folder))
    save, saved = runs.save_run, []

    def killed_save(*arguments: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(arguments)
        save(*arguments)

    again = {"run": str(folder / "again")}
    with monkeypatch.context() as patch:
        if killed_at == "a step":
            stop_before(patch, 6)
        else:
            patch.setattr(runs, "save_run", killed_save)
        with pytest.raises(KeyboardInterrupt):
            heal(healing(store, folder, **again))
    with pytest.raises(RunError, match="unfinished run"):
        heal(healing(store, folder, **again))
    heal(healing(store, folder, resume=True, **again))
    for part in ("0-1", "2-3"):
        whole, parts = weights_of(folder / f"healed-{part}"), weights_of(folder / f"again-{part}")
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timeless = {"seconds": 0, "data_wait_seconds": 0}
    lines = [[row | timeless for row in log_of(folder / f"{run}-0-1")] for run in ("healed", "again")]
    assert lines[0] == lines[1]
    assert heal(healing(store, folder, resume=True, **again))["already_finished"]


def test_finished_runs_are_not_healed_over_by_accident(trained: tuple[Path, Path], folder: Path) -> None:
    store = trained[0]
    heal(healing(store, folder, tokens=4 * CONTEXT))
    kept = (folder / "healed-2-3" / runs.MANIFEST).read_bytes()
    shutil.rmtree(folder / "healed-0-1")
    with pytest.raises(RunError, match="all runs of a healed student, or none"):
        heal(healing(store, folder, tokens=4 * CONTEXT, resume=True))
    assert (folder / "healed-2-3" / runs.MANIFEST).read_bytes() == kept
    heal(healing(store, folder, tokens=4 * CONTEXT, force=True))
    assert len(runs.open_student(folder / "healed-0-1")) == 2


def test_the_only_student_is_healed_by_default(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    store = extracted(tmp_path, teachers["neox"], text_folder, logits=8, layers="all")
    train(short_run(store, tmp_path, objective="regression", block="0:1,2:3", joint=True, run=None))
    result = heal(HealSettings(store=store, tokens=CONTEXT, compute_dtype="float32"))
    assert [Path(run).name for run in result["joint"]] == [
        "0-1-regression-seed0-healed",
        "2-3-regression-seed0-healed",
    ]
