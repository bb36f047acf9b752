"""`lftpipe plan` and `compress`: candidates, scores, the choice, and what is trained from it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT, extracted
from training_runs import short_run, teacher_of

import lftpipe
from lftpipe import runs
from lftpipe.base.errors import LftpipeError, RunError, SettingsError, StoreError
from lftpipe.commands.compress import compress
from lftpipe.commands.compress import summary as summary_of_compress
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.plan import plan, summary
from lftpipe.commands.train import train
from lftpipe.config.settings import CompressSettings, EvaluateSettings, PlanSettings
from lftpipe.results.plan import Plan
from lftpipe.store import Store
from lftpipe.teacher.tail import count_parameters


@pytest.fixture(autouse=True, scope="module")
def few_channels() -> Any:
    """The teachers of the tests have but 64 and 48 channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lftpipe.base.shape.CHANNELS", 8)
        yield


def planning(store: Path, **values: Any) -> PlanSettings:
    given = {
        "store": store,
        "tokens": 8 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "widths": (0.5,),
        "compute_dtype": "float32",
        "hold_back": 0.1,
        "out": store.parent / "plan.json",
    }
    return PlanSettings(**given | values)


@pytest.fixture(scope="module", params=["neox", pytest.param("llama", marks=pytest.mark.slow)])
def planned(
    request: pytest.FixtureRequest,
    teachers: dict[str, Path],
    text_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Plan]:
    """A store with a plan beside it."""
    store = extracted(tmp_path_factory.mktemp("plan"), teachers[request.param], text_folder)
    plan(planning(store, size=0.8))
    return store, Plan.from_json(store.parent / "plan.json")


def test_the_choice_keeps_the_budget_and_is_the_best_that_was_tried(planned: tuple[Path, Plan]) -> None:
    store, found = planned
    total = count_parameters(teacher_of(Store.open(store)))
    assert found.cost.parameters == total
    assert found.store == Store.open(store).fingerprint
    assert found.choice.cost.parameters <= 0.8 * total
    assert found.choice.size == found.choice.cost.parameters / total
    assert found.choice.score == min(choice.score for choice in found.tried if choice.score is not None)
    scores = {candidate.part: candidate.score for candidate in found.candidates}
    assert found.choice.predicted == pytest.approx(sum(scores[part] for part in found.choice.parts))
    sizes = [choice.cost.parameters for choice in found.front]
    assert sizes == sorted(sizes)
    assert [choice.predicted for choice in found.front] == sorted(
        (choice.predicted for choice in found.front), reverse=True
    )
    assert (store.parent / "plan.png").is_file()
    assert all(candidate.score >= 0 and candidate.stderr >= 0 for candidate in found.candidates)


def test_a_plan_is_trained_as_one_student_of_just_that_size(
    planned: tuple[Path, Plan], tmp_path: Path
) -> None:
    store, found = planned
    given = short_run(store, tmp_path, plan=store.parent / "plan.json", block="auto")
    run = runs.open_run(Path(train(given)["run"]))
    assert list(run.parts) == found.choice.parts
    assert run.shape == found.choice.shape
    scored = evaluate(EvaluateSettings(store=store, runs=(str(run.path),), k=(1,), out=tmp_path / "r.json"))
    row = next(row for row in scored["rows"] if row["run"])
    assert row["parameters"] == found.choice.cost.parameters
    assert row["layers"] == found.choice.cost.layers
    recorded = runs.read_settings(run.path)[0]
    assert "plan" not in recorded  # it can be made again without the plan
    assert train(given)["already_finished"]


def test_candidates_are_not_trained_again_for_another_budget(
    planned: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = planned
    monkeypatch.setattr("lftpipe.training.several.TrainingRun", None)
    found = plan(planning(store, layers=3, out=tmp_path / "plan.json"))
    assert found["choice"]["cost"]["layers"] <= 3
    assert "next: lftpipe train --plan" in str(summary(found).__dict__)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0.01}, r"--size 0.01 / expected: at least 0\.\d+, the smallest shape's"),
        ({"speed": 900.0}, r"--speed 900 / expected: at most .*, the fastest shape"),
        ({"size": 0.5, "layers": 3}, "--size with --layers / expected: one of the two"),
        ({"tokens": 4 * CONTEXT}, r"tokens = .* for the candidates in .* as the plan was begun"),
    ],
)
def test_what_no_shape_keeps_is_refused(
    planned: tuple[Path, Plan], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LftpipeError, match=message):
        plan(planning(planned[0], out=tmp_path / "plan.json", **changes))


def test_a_plan_of_another_store_is_refused(
    planned: tuple[Path, Plan], stores: dict[str, Path], tmp_path: Path
) -> None:
    own = Store.open(planned[0]).fingerprint
    other = next(path for path in stores.values() if Store.open(path).fingerprint != own)
    with pytest.raises(SettingsError, match=r"--plan .*, of another store than"):
        train(short_run(other, tmp_path, plan=planned[0].parent / "plan.json"))


def test_a_store_without_all_states_is_refused(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    store = extracted(tmp_path, teachers["neox"], text_folder, layers="0,2,4")
    with pytest.raises(StoreError, match=r"without state 1 .* extract with --layers all"):
        plan(planning(store))


@pytest.mark.slow
def test_compress_makes_a_checkpoint_and_goes_on_where_it_was(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lftpipe.planning.library.DEEPEST", 1)
    monkeypatch.setattr("lftpipe.planning.library.LONGEST", 2)
    given = CompressSettings(
        workspace=tmp_path,
        model=str(teachers["llama"]),
        corpus=str(text_folder),
        tokens=8192,
        size=0.8,
        out=tmp_path / "student",
    )
    with monkeypatch.context() as patch:
        patch.setattr("lftpipe.commands.compress.evaluate", None)
        with pytest.raises(TypeError):
            compress(given)
    made = compress(given)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_type"] == ("llama" if made["form"] == "plain" else "latent_flow_llama")
    student = lftpipe.load_student(tmp_path / "student")
    names = {row["run"]: row["parameters"] for row in made["results"]["rows"] if row["run"]}
    assert len(names) == 3
    assert student.num_parameters() == names[Path(made["run"]).name]
    assert max(names.values()) == names[Path(made["run"]).name]
    assert "AutoModelForCausalLM.from_pretrained" in str(summary_of_compress(made).__dict__)
    monkeypatch.setattr("lftpipe.training.several.TrainingRun", None)
    assert compress(given)["run"] == made["run"]
    with pytest.raises(RunError, match="a plan of another store or with other settings"):
        compress(replace(given, minutes=1.0))
