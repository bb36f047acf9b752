"""A complete store takes more sequences, and nobody who reads it notices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fake_states import files, fill, make_spec, states, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.store import Store, StoreWriter, verify_store

SMALL = {"train": 10, "validation": 0}
LARGE = {"train": 18, "validation": 5}


@pytest.fixture
def path(tmp_path) -> Path:
    write(tmp_path / "states.zarr", make_spec(sequences=SMALL))
    return tmp_path / "states.zarr"


def same_values(path: Path, other: Path) -> None:
    for name in ("hidden", "attention", "tokens", "document"):
        for split in LARGE:
            one, two = (zarr.open(each, mode="r")[f"{split}/{name}"][:] for each in (path, other))
            np.testing.assert_array_equal(one, two)


def test_a_grown_store_equals_one_made_large(path, tmp_path):
    inodes = {name: (path / name).stat().st_ino for name in files(path) if "/c." in name}
    written = write(path, make_spec(sequences=LARGE))
    assert [(key.split, key.index, key.sequences) for key in written] == [
        ("train", 2, range(10, 12)),
        ("train", 3, range(12, 16)),
        ("train", 4, range(16, 18)),
        ("validation", 0, range(4)),
        ("validation", 1, range(4, 5)),
    ]
    write(tmp_path / "large", make_spec(sequences=LARGE))
    same_values(path, tmp_path / "large")
    assert verify_store(path).ok
    kept = {name for name, inode in inodes.items() if (path / name).stat().st_ino == inode}
    assert inodes.keys() - kept == {name for name in inodes if ".2" in name}


def test_an_open_reader_and_new_ones_are_not_disturbed_until_the_end(path):
    large, old = make_spec(sequences=LARGE), make_spec(sequences=SMALL)
    opened = Store.open(path)
    fingerprint = opened.fingerprint
    batches: Any = opened.batches("train", [0, 3], batch_size=4, seed=1)

    def check(store: Store) -> None:
        assert (store.num_sequences("train"), store.fingerprint) == (10, fingerprint)
        for layer in old.layers:
            want = states(old, "train", "hidden", layer, range(10)).astype(np.float16)
            np.testing.assert_array_equal(store.read("train", layer, range(10)), want)
        np.testing.assert_array_equal(store.tokens("train"), tokens(old, "train")[0])
        assert next(batches).sequences.max() < 10
        assert zarr.open_array(path, path="train/hidden", mode="r").shape[1] == (
            10 if store is not opened or growing else 18
        )
        assert verify_store(path).ok

    growing = True
    with StoreWriter.open(path, large) as writer:
        for split in LARGE:
            writer.put_tokens(split, *tokens(large, split))
        for key in writer.pending():
            with writer.shard(key) as shard:
                check(Store.open(path))
                fill(shard, large)
                check(Store.open(path))
            check(Store.open(path))
            check(opened)
        writer.finish()
    growing = False
    check(opened)
    assert Store.open(path).num_sequences("train") == 18
    batches.close()


def test_growth_may_be_interrupted_and_go_further(path, tmp_path):
    large = make_spec(sequences=LARGE)
    with StoreWriter.open(path, large) as writer:
        assert not writer.complete
        for split in LARGE:
            writer.put_tokens(split, *tokens(large, split))
        for key in writer.pending()[:2]:
            with writer.shard(key) as shard:
                fill(shard, large)
    assert Store.open(path).num_sequences("train") == 10
    with pytest.raises(StoreError, match="10 train sequences, of a store of 18"):
        StoreWriter.open(path, make_spec(sequences=SMALL))
    larger = make_spec(sequences={"train": 21, "validation": 5})
    assert len(write(path, larger)) == 4
    write(tmp_path / "large", larger)
    same_values(path, tmp_path / "large")
    assert verify_store(path).ok


def test_only_the_new_tokens_need_be_given(path, tmp_path):
    large = make_spec(sequences=LARGE)
    with StoreWriter.open(path, large) as writer:
        ids, document = tokens(large, "train")
        writer.put_tokens("train", ids[10:], document[10:], 10)
        writer.put_tokens("validation", *tokens(large, "validation"))
        for key in writer.pending():
            with writer.shard(key) as shard:
                fill(shard, large)
        writer.finish()
    write(tmp_path / "large", large)
    same_values(path, tmp_path / "large")


def test_a_rotten_last_shard_is_not_carried_over(path):
    file = path / "train/hidden/c.0.2.0.0"
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"chunk 0 of .*train/hidden/c\.0\.2\.0\.0 is damaged.*--repair"):
        write(path, make_spec(sequences=LARGE))
    assert [key.index for key in write(path, make_spec(sequences=LARGE), repair=verify_store(path))] == [
        2,
        3,
        4,
        0,
        1,
    ]
    assert verify_store(path).ok


def test_growth_is_of_the_same_identity(path):
    with pytest.raises(StoreError, match=r"identity\.seed: 0 -> 1"):
        StoreWriter.open(
            path,
            make_spec(sequences=LARGE, identity={"teacher": {"name": "fake", "revision": "a1"}, "seed": 1}),
        )
