"""What extraction refuses: senseless settings, corpora and teachers, and a disk that is too small."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CONTEXT
from extractions import change, small_extraction
from safetensors.torch import load_file, save_file

from lftpipe.base.errors import CorpusError, LftpipeError, SettingsError, StoreError, TeacherError
from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return small_extraction(tmp_path, teachers["neox"], text_folder)


def test_a_teacher_that_overflows_stops_the_run_and_names_the_place(settings, tmp_path, teachers):
    model = tmp_path / "hot"
    shutil.copytree(teachers["neox"], model)
    weights = load_file(model / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][5] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    hot = change(settings, model=str(model), dtype="float16")
    with pytest.raises(StoreError, match=r"hidden layer 2.*channel 5.*--dtype float32"):
        extract(hot)
    assert extract(change(hot, dtype="float32", force=True))["tokens"]["train"] == 40 * CONTEXT


def test_a_teacher_of_nan_is_reported_with_its_place_in_any_compute_dtype(settings, teachers, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(teachers["neox"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for compute_dtype in ("float32", "bfloat16"):
        asked = change(settings, model=str(folder), compute_dtype=compute_dtype, store=tmp_path / "nan.zarr")
        with pytest.raises(StoreError, match=r"nan in hidden layer 2, train sequence 0, position 0, channel"):
            extract(change(asked, force=True))


def test_a_run_that_does_not_fit_is_refused_before_it_starts(settings, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=256 * 2**20)  # just what is to be spared
    monkeypatch.setattr("lftpipe.extraction.plan.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"free.*room for it and 268.4 MB to spare.*--layers"):
        extract(change(settings, tokens=10**6))
    assert not list(settings.workspace.rglob("*.zarr"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "9:4"}, SettingsError, "4:9"),
        ({"layers": "0,17"}, SettingsError, "0 to 4"),
        ({"layers": "six"}, SettingsError, "6,18"),
        ({"context": 4096}, SettingsError, "--context 128"),
        ({"corpus": "nowhere.txt"}, CorpusError, "python-stdlib"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, error, message):
    with pytest.raises(error, match=message):
        extract(change(settings, **changes))
    assert not list(settings.workspace.rglob("*.zarr"))


def test_corpora_that_make_no_sense(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "short.txt").write_text("a word")
    for name in ("empty", "empty.txt", "binary.txt", "short.txt"):
        with pytest.raises(CorpusError, match=name):
            extract(change(settings, corpus=str(tmp_path / name)))
    assert not list(tmp_path.rglob("*.zarr"))


def test_errors_are_one_line_and_json_plain_results(settings):
    json.dumps(extract(settings).to_json())
    with pytest.raises(LftpipeError) as caught:
        extract(change(settings, layers="9:4"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(settings, teachers, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(teachers["neox"], model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: id_ + 100 * (id_ > 200) for word, id_ in vocabulary.items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        TeacherError, match=r"a tokenizer or a corpus with token \d+ beside .* / expected: tokens below 320"
    ):
        extract(change(settings, model=str(model)))
