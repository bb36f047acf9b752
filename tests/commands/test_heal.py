"""`lftpipe heal`: what learns, what stays, what a healed run is, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, extracted
from tiny_students import tokens
from training_runs import log_of, short_run, stop_before, teacher_of, weights_of

from lftpipe import runs
from lftpipe.base.errors import LftpipeError, RunError, SettingsError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExportSettings, HealSettings, TrainSettings
from lftpipe.store import Store
from lftpipe.student.assemble import build_student, load_model
from lftpipe.training.healing import HealingStudent

STEPS = 10


@pytest.fixture(scope="session")
def logit_stores(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], text_folder: Path
) -> dict[str, Path]:
    workspace = tmp_path_factory.mktemp("logits")
    return {
        name: extracted(workspace, teachers[name], text_folder, logits=8, layers="1,3,4")
        for name in ("neox", "llama")
    }


def healing(store: Path, folder: Path, **values: object) -> HealSettings:
    given = {
        "store": store,
        "target": str(folder / "run"),
        "tokens": STEPS * 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "run": str(folder / "healed"),
        "log_every": 1,
        "evaluate_every": 5,
        "checkpoint_every": 4,
        "hold_back": 0.1,
        "learning_rate": 5e-3,
    }
    return HealSettings(**given | values)


def trained(store: Path, folder: Path, objective: str, **values: object) -> TrainSettings:
    settings = short_run(store, folder, objective=objective, **values)
    train(settings)
    return settings


def scored(store: Path, folder: Path, *names: str) -> dict[str, dict[str, float]]:
    result = evaluate(
        EvaluateSettings(
            store=store,
            runs=tuple(str(folder / name) for name in names),
            k=(3,),
            skips=(),
            out=folder / "results.json",
            force=True,
        )
    )
    return {row["run"]: row for row in result["rows"] if row["run"]}


@pytest.mark.parametrize("family", ["neox", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("objective", "how"),
    [
        ("skip", {"adapter": "full", "loss": "logits"}),
        ("regression", {"adapter": "lora", "loss": "top-logits"}),
        ("fw", {"adapter": "lora", "train": "student", "rank": 4, "loss": "sampled-logits"}),
        ("linear", {"adapter": "full", "train": "student", "loss": "logits"}),
    ],
)
def test_healing_lowers_the_divergence_and_every_form_of_the_run_agrees(
    logit_stores: dict[str, Path], tmp_path: Path, family: str, objective: str, how: dict[str, object]
) -> None:
    store = Store.open(logit_stores[family])
    trained(store.path, tmp_path, objective)
    heal(healing(store.path, tmp_path, **how))
    rows = scored(store.path, tmp_path, "run", "healed")
    assert rows["healed"]["kl"] < rows["run"]["kl"]
    assert rows["healed"]["method"] == f"{objective}, healed"
    assert rows["healed"]["parameters"] == rows["run"]["parameters"]
    # Evaluated from the cache, healed in its own module, built as a transformers model: one function.
    run, teacher, ids = runs.open_run(tmp_path / "healed"), teacher_of(store), tokens(24, sequences=2)
    student = build_student(teacher, [run])
    own = HealingStudent(run, teacher, whole=True)
    with torch.inference_mode():
        states = build_student(teacher, [run]).base_model(ids).last_hidden_state
        context = _context(teacher, ids)
        embedded = student.get_input_embeddings()(ids)
        assert (own(embedded, context) - states).abs().max() < 1e-4


def _context(teacher, ids):
    from lftpipe.families.attention import attention_context
    from lftpipe.teacher.layers import load_rotary

    places = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    return attention_context(load_rotary(teacher), places)


def test_a_healed_run_exports_plain_and_says_what_it_healed(
    logit_stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Store.open(logit_stores["neox"])
    trained(store.path, tmp_path, "fw", solver="euler")
    heal(healing(store.path, tmp_path))
    heal(healing(store.path, tmp_path, target=str(tmp_path / "healed"), run=str(tmp_path / "twice")))
    out = export(
        ExportSettings(
            workspace=tmp_path, runs=(str(tmp_path / "twice"),), form="plain", out=tmp_path / "out"
        )
    )
    assert out["max_logit_difference"] < 1e-4
    ids = tokens(20)
    student = build_student(teacher_of(store), [runs.open_run(tmp_path / "twice")])
    with torch.inference_mode():
        assert (load_model(tmp_path / "out")(ids).logits - student(ids).logits).abs().max() < 1e-4
    manifest = json.loads((tmp_path / "twice" / runs.MANIFEST).read_text())
    assert manifest["healed"]["run"] == str(tmp_path / "healed")
    assert manifest["healed"]["before"]["run"] == str(tmp_path / "run")
    assert manifest["train_tokens"] == (12 + 2 * STEPS) * 4 * CONTEXT
    assert "healed" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("adapter", "often"),
    [("lora", {"checkpoint_every": 4}), ("full", {"checkpoint_every": 0, "checkpoint_minutes": 1e-9})],
)
def test_a_resumed_healing_ends_with_the_same_bits(
    logit_stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
    often: dict[str, object],
) -> None:
    store = logit_stores["neox"]
    trained(store, tmp_path, "regression")
    heal(healing(store, tmp_path, adapter=adapter))
    again = {"adapter": adapter, "run": str(tmp_path / "again"), **often}
    with monkeypatch.context() as patch:
        stop_before(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            heal(healing(store, tmp_path, **again))
    with pytest.raises(RunError, match="unfinished run"):
        heal(healing(store, tmp_path, **again))
    assert (tmp_path / "again" / runs.CHECKPOINT).is_file()
    with pytest.raises(RunError, match="`lftpipe heal --resume`"):
        runs.open_run(tmp_path / "again")
    heal(healing(store, tmp_path, resume=True, **again))
    whole, parts = weights_of(tmp_path / "healed"), weights_of(tmp_path / "again")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timeless = {"seconds": 0, "data_wait_seconds": 0}
    lines = [[{**row, **timeless} for row in log_of(tmp_path / run)] for run in ("healed", "again")]
    assert lines[0] == lines[1]
    assert heal(healing(store, tmp_path, resume=True, **again))["already_finished"]


def test_the_tail_leaves_what_is_before_the_block_alone(
    logit_stores: dict[str, Path], tmp_path: Path
) -> None:
    store = logit_stores["llama"]
    trained(store, tmp_path, "regression")
    heal(healing(store, tmp_path, loss="tokens", adapter="full"))
    changed = {name for name in weights_of(tmp_path / "healed") if name.startswith("teacher.")}
    assert {name.split(".")[3] for name in changed if "layers" in name} == {"3"}
    assert "teacher.model.norm.weight" in changed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"target": "nowhere"}, "missing run"),
        ({"hold_back": 1.0}, "--hold-back 1"),
    ],
)
def test_bad_settings_are_refused(
    logit_stores: dict[str, Path], tmp_path: Path, given: dict[str, object], message: str
) -> None:
    trained(logit_stores["neox"], tmp_path, "skip")
    with pytest.raises(LftpipeError, match=message):
        heal(healing(logit_stores["neox"], tmp_path, **given))


def test_what_a_store_lacks_is_said(
    stores: dict[str, Path], logit_stores: dict[str, Path], tmp_path: Path
) -> None:
    trained(stores["neox"], tmp_path, "skip")
    with pytest.raises(SettingsError, match="--logits 64"):
        heal(healing(stores["neox"], tmp_path))
    with pytest.raises(RunError, match="another store"):
        heal(healing(logit_stores["llama"], tmp_path))


def test_a_block_at_the_end_has_no_tail(logit_stores: dict[str, Path], tmp_path: Path) -> None:
    trained(logit_stores["neox"], tmp_path, "regression", block="1:4")
    with pytest.raises(SettingsError, match="a layer after a block"):
        heal(healing(logit_stores["neox"], tmp_path))


def test_the_tail_of_a_healed_student_is_refused(logit_stores: dict[str, Path], tmp_path: Path) -> None:
    store = logit_stores["neox"]
    trained(store, tmp_path, "skip")
    heal(healing(store, tmp_path, train="student", adapter="full"))
    with pytest.raises(SettingsError, match="first layers were healed"):
        heal(healing(store, tmp_path, target=str(tmp_path / "healed"), run=str(tmp_path / "twice")))


def test_the_only_run_is_healed_by_default(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    store = extracted(tmp_path, teachers["neox"], text_folder, logits=8, layers="1,3")
    train(short_run(store, tmp_path, objective="skip", run="first"))
    result = heal(HealSettings(store=store, tokens=CONTEXT, compute_dtype="float32"))
    assert Path(result["run"]).name == "first-healed"
    train(short_run(store, tmp_path, objective="linear", run="second"))
    with pytest.raises(RunError, match="2 runs"):
        heal(HealSettings(store=store, tokens=CONTEXT))
