"""What `recouple` refuses, and what `train` takes from the map."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from walk_store import short_map, write_store

from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.config.settings import TrainSettings
from lftpipe.recoupling.stored_map import choose_block
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("walk") / "states.zarr")


@pytest.fixture
def run(store, tmp_path):
    """`recouple` with few tokens, into a new file."""
    return partial(short_map, store, tmp_path / "map.json")


def test_more_tokens_than_the_store_has(run):
    with pytest.raises(SettingsError, match=r"3 of --tokens 200, 600 samples.*384 positions.*lower --tokens"):
        run(tokens=200)
    with pytest.raises(SettingsError, match=r"384 positions, fewer without first ones"):
        run(tokens=128, skip_first=True)


def test_layers_that_the_store_lacks(run, tmp_path):
    few = write_store(tmp_path / "few.zarr", layers=(0, 2, 4))
    with pytest.raises(SettingsError, match=r"lacks 1, 3 .*states among 0, 2, 4"):
        run(store=few.path, layers="0:4")
    assert run(store=few.path)["layers"] == [0, 2, 4]


def test_one_state_is_no_pair(run):
    with pytest.raises(SettingsError, match=r"one state, 2 .*at least two"):
        run(layers="2")


def test_a_pair_to_show_must_be_on_the_map(run):
    with pytest.raises(SettingsError, match=r"--show 1:3 .*two of the states 0, 1, 2"):
        run(layers="0:3", show="1:3")
    with pytest.raises(SettingsError, match=r"block '1-2'.*m:n, as in 6:12"):
        run(show="1-2")


def test_a_map_is_not_overwritten_unasked(run):
    run()
    with pytest.raises(SettingsError, match=r"map.json, which exists .*--force"):
        run()
    run(force=True)


def test_values_that_are_not_finite_are_named(run, monkeypatch):
    read = Store.read

    def damaged(self, split, layer, sequences, **options):
        states = read(self, split, layer, sequences, **options)
        if layer == 2:
            states[..., 7] = np.nan
        return states

    monkeypatch.setattr(Store, "read", damaged)
    with pytest.raises(
        StoreError, match=r"state 2 that is not finite at sequence \d+, position \d+, channel 7"
    ):
        run()


def test_too_large_for_exact_transport(run):
    with pytest.raises(SettingsError, match=r"--tokens 4097 .*at most 4096 .*--approximate"):
        run(tokens=4097)


def test_auto_makes_the_map_and_takes_its_best_block(tmp_path):
    path = tmp_path / "walk" / "states.zarr"
    write_store(path, sequences=160)
    settings = TrainSettings(store=path, replace=0.5)
    m, n = choose_block(path, settings)
    made = json.loads((path.parent / "recoupling.json").read_text())
    assert made["settings"]["tokens"] == 256
    assert [m, n] == made["ranking"][1]["blocks"][0]
    assert choose_block(path, settings) == (m, n)


def test_auto_refuses_the_map_of_another_store(run, store):
    path = store.path.parent / "recoupling.json"
    run(out=path)
    dataclasses.replace(RecouplingMap.from_json(path), store_fingerprint="0" * 32).write(path)
    try:
        with pytest.raises(SettingsError, match=r"recoupling.json, made from another.*recouple --force"):
            choose_block(store.path, TrainSettings(store=store.path))
    finally:
        path.unlink()
