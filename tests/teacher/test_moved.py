"""A teacher in a local folder is found again where it was moved together with what was made with it."""

import shutil
from pathlib import Path

import pytest
from conftest import extracted
from training_runs import assert_same_weights, short_run

from lftpipe.base.errors import TeacherError
from lftpipe.commands.generate import generate
from lftpipe.commands.train import train
from lftpipe.config.settings import GenerateSettings


@pytest.fixture
def moved(teachers: dict[str, Path], text_folder: Path, tmp_path: Path) -> Path:
    """A folder of a teacher, a store and a run, that was made elsewhere."""
    old = tmp_path / "old"
    shutil.copytree(teachers["neox"], old / "models" / "neox")
    store = extracted(old / "data", old / "models" / "neox", text_folder, layers="1,3")
    train(short_run(store, tmp_path, objective="regression", run="run"))
    old.rename(tmp_path / "new")
    return tmp_path / "new"


def test_all_goes_on_elsewhere(moved: Path, tmp_path: Path) -> None:
    runs = moved / "data/neox/runs"
    train(
        short_run(moved / "data/neox/states.zarr", tmp_path, objective="regression", run=str(runs / "again"))
    )
    assert_same_weights(runs / "run", runs / "again")
    assert generate(GenerateSettings(target=str(runs / "run"), prompt="a b", max_new_tokens=2))["new_tokens"]


def test_another_teacher_in_its_place_is_refused(
    moved: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.rmtree(moved / "models")
    shutil.copytree(teachers["llama"], moved / "models" / "neox")
    with pytest.raises(TeacherError, match="whose weights changed"):
        train(short_run(moved / "data/neox/states.zarr", tmp_path, objective="skip"))


def test_where_it_is_looked_for_is_said(moved: Path, tmp_path: Path) -> None:
    shutil.rmtree(moved / "models")
    with pytest.raises(
        TeacherError, match=r"old/models/neox of .* which is not there .* such as to .*new/data/neox/neox"
    ):
        train(short_run(moved / "data/neox/states.zarr", tmp_path, objective="skip"))
