"""The error of bfloat16: that between two stores, measured once."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT
from extractions import change, small_extraction
from rich.console import Console

from lftpipe.commands.extract import extract
from lftpipe.commands.info import info, summary
from lftpipe.config.settings import ExtractSettings, InfoSettings
from lftpipe.store import ShardWriter, Slot, Store


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return small_extraction(tmp_path, teachers["neox"], text_folder)


def test_the_error_of_bfloat16_is_that_between_two_stores(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    mine = change(settings, compute_dtype="bfloat16", layers="0:4")
    store = Store.open(Path(extract(mine)["store"]))
    exact = Store.open(Path(extract(change(settings, layers="0:4", store=tmp_path / "exact.zarr"))["store"]))
    assert "compute_error" not in exact.spec.details
    found = store.spec.details["compute_error"]
    assert (found["sequences"], found["tokens"]) == (4, 4 * CONTEXT)
    for array, layers in (("hidden", store.layers), ("attention", store.attention_layers)):
        for index, layer in enumerate(layers):
            ours, theirs = (each.read("train", layer, range(4), array=array) for each in (store, exact))
            for name, first in (("nmse", 0), ("nmse_without_first", 1)):
                expected = np.square(ours - theirs)[:, first:].sum() / np.square(theirs)[:, first:].sum()
                assert found[array][name][index] == pytest.approx(expected, rel=0.02, abs=1e-12)
    assert found["hidden"]["nmse"][0] == 0 < found["hidden"]["nmse"][-1] < 1e-3
    described = info(InfoSettings(workspace=tmp_path, target=store.path))
    assert described["compute_error"] == found
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(described))
    assert "NMSE to float32" in console.export_text()


def test_the_error_of_bfloat16_is_measured_once_in_a_stores_life(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    settings = change(settings, compute_dtype="bfloat16")
    write, calls = ShardWriter.write, []

    def interrupted(self: ShardWriter, slot: Slot) -> None:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        write(self, slot)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(settings)
    monkeypatch.setattr("lftpipe.extraction.shard_job.bf16_error", None)
    path = Path(extract(settings)["store"])
    found = Store.open(path).spec.details["compute_error"]
    extract(change(settings, tokens=60 * CONTEXT))
    (path / "manifest.json").unlink()
    extract(change(settings, tokens=60 * CONTEXT, repair=True))
    assert Store.open(path).spec.details["compute_error"] == found
