"""A store as an xarray data set: layers by their numbers, the same values."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, extracted

import lftpipe
from lftpipe.base.errors import StoreError


@pytest.fixture(scope="module")
def some_layers(tmp_path_factory, teachers: dict[str, Path], text_folder: Path) -> Path:
    return extracted(tmp_path_factory.mktemp("some"), teachers["neox"], text_folder, layers="1,3,4")


def test_layers_are_named_by_their_numbers(some_layers: Path) -> None:
    store = lftpipe.open_store(some_layers)
    train = store.to_xarray()
    assert train.hidden.dims == ("layer", "sequence", "position", "feature")
    assert train.layer.values.tolist() == [1, 3, 4]
    assert train.attention_layer.values.tolist() == list(store.attention_layers)
    rows = train.hidden.sel(layer=3).isel(sequence=[2, 0]).values
    np.testing.assert_array_equal(rows, store.read("train", 3, [2, 0]))
    assert store.to_xarray("validation").sizes["sequence"] == 7
    assert train.sizes["position"] == CONTEXT


def test_what_is_no_split_and_a_missing_package_are_refused(some_layers: Path, monkeypatch) -> None:
    store = lftpipe.open_store(some_layers)
    with pytest.raises(StoreError, match="train or validation"):
        store.to_xarray("test")
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(StoreError, match=r"pip install \"lftpipe\[xarray\]\""):
        store.to_xarray()
