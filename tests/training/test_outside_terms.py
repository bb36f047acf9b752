"""Terms of the loss from outside lftpipe: by a call, and by a package's entry point."""

import sys
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_weights, change, short_run

import lftpipe
from lftpipe.base.errors import SettingsError
from lftpipe.commands.train import train
from lftpipe.config import loss
from lftpipe.config.loss import parse_loss
from lftpipe.config.settings import TrainSettings
from lftpipe.flow.objective import flow_walking
from lftpipe.training.terms import Problem


@pytest.fixture
def settings(stores: dict[str, Path], tmp_path: Path) -> TrainSettings:
    return short_run(stores["neox"], tmp_path, objective="regression")


@pytest.fixture(autouse=True)
def nothing_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_ADDED", {})


def walked(problem: Problem) -> torch.Tensor:
    return flow_walking(problem.end, problem.x_1, problem.scale)


def test_an_added_term_trains_as_lftpipes_own_does(settings: TrainSettings, tmp_path: Path) -> None:
    lftpipe.add_term("mine", walked)
    train(settings)
    train(change(settings, loss="mine", run=str(tmp_path / "mine")))
    assert_same_weights(str(settings.run), tmp_path / "mine")


def test_a_term_has_a_weight_and_a_stage_like_any_other(settings: TrainSettings, tmp_path: Path) -> None:
    lftpipe.add_term(
        "cosine", lambda problem: 1 - torch.cosine_similarity(problem.end, problem.x_1, -1).mean()
    )
    (first, second) = parse_loss("regression@0.5/regression,cosine:0.1")
    assert (first.weights, second.weights) == ({"regression": 1.0}, {"regression": 1.0, "cosine": 0.1})
    result = train(change(settings, loss="regression@0.5/regression,cosine:0.1"))
    assert result["loss"] > 0


def test_an_installed_package_offers_a_term_by_an_entry_point(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site"
    (package / "theirs-1.0.dist-info").mkdir(parents=True)
    (package / "theirs-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n"
    )
    (package / "theirs-1.0.dist-info/entry_points.txt").write_text(
        "[lftpipe.terms]\ntheirs = their_terms:term\nbroken = their_terms:nothing\n"
    )
    (package / "their_terms.py").write_text(
        "def term(problem):\n    return (problem.end - problem.x_1).square().mean()\n"
    )
    monkeypatch.syspath_prepend(str(package))
    assert "their_terms" not in sys.modules
    parse_loss("theirs")
    assert "their_terms" not in sys.modules  # a name is enough to read the loss
    assert train(change(settings, loss="theirs"))["loss"] > 0
    with pytest.raises(SettingsError, match="a function that can be imported"):
        train(change(settings, loss="broken", run=str(tmp_path / "broken")))


@pytest.mark.parametrize("name", ["fw", "Mine", "a b", ""])
def test_a_name_that_is_taken_or_cannot_be_written_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="choose another name"):
        lftpipe.add_term(name, walked)


@pytest.mark.parametrize("value", [torch.ones(2), 1.0, torch.tensor(1)])
def test_what_is_no_scalar_is_refused(settings: TrainSettings, value: object) -> None:
    lftpipe.add_term("wrong", lambda problem: value)
    with pytest.raises(SettingsError, match=r"'wrong', which gives .* take the mean"):
        train(change(settings, loss="wrong"))


def test_a_run_whose_term_is_gone_says_so(settings: TrainSettings) -> None:
    with pytest.raises(SettingsError, match="'mine' in --loss"):
        train(change(settings, loss="mine"))
    with pytest.raises(SettingsError, match="which nothing here computes"):
        loss.load_term("mine")
