"""`evaluate --corpus`: runs scored on text that their store does not hold, the teacher run once for it."""

import json
from pathlib import Path

import pytest
from conftest import extracted, text_of
from training_runs import short_run

from lftpipe.base.errors import CorpusError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings
from lftpipe.teacher import trunk


@pytest.fixture
def store(teachers: dict[str, Path], text_folder: Path, tmp_path: Path) -> Path:
    path = extracted(tmp_path / "data", teachers["neox"], text_folder, layers="1,3")
    train(short_run(path, tmp_path, objective="linear"))
    return path


def settings(store: Path, folder: Path, text: Path, **values: object) -> EvaluateSettings:
    given = {
        "store": store,
        "runs": (str(folder / "run"),),
        "skips": (),
        "corpus": str(text),
        "force": True,
    }
    return EvaluateSettings(**given | values)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    file = tmp_path / "other.jsonl"
    rows = [{"text": text_of(1000 + seed, 60)} for seed in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_another_corpus_gives_other_figures_and_the_own_one_the_same(
    store: Path, other: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluate(settings(store, tmp_path, other, corpus=None))
    there = evaluate(settings(store, tmp_path, other))
    assert Path(there["out"]).name.startswith("results-other-")
    assert there["corpus"] == str(other)
    assert own["corpus"] is None
    assert there["rows"][-1]["kl"] != own["rows"][-1]["kl"]
    assert f"of {other}" in Path(there["out"]).with_suffix(".md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr(trunk.Trunk, "run", never)
    again = evaluate(settings(store, tmp_path, other))
    assert [row["kl"] for row in again["rows"]] == [row["kl"] for row in there["rows"]]


def test_a_corpus_that_is_not_there_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        evaluate(settings(store, tmp_path, tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("changes", [{"layers": "1,2,3"}, {"tokens_only": True}])
def test_a_store_that_is_made_anew_has_states_of_its_own_elsewhere(
    store: Path,
    other: Path,
    teachers: dict[str, Path],
    text_folder: Path,
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    before = evaluate(settings(store, tmp_path, other))
    made = {"layers": "1,3", **changes, "force": True}
    again = extracted(tmp_path / "data", teachers["neox"], text_folder, **made)
    assert again == store
    after = evaluate(settings(store, tmp_path, other))
    assert after["rows"][-1]["kl"] == pytest.approx(before["rows"][-1]["kl"], rel=0.05)
