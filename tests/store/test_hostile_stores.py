"""Manifests and journals that say what they should not, sealed as if they were ours; shards of others."""

import copy
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import cases
from fake_states import files, fill, make_spec, reseal, states, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.base.files import read_sealed, write_sealed
from lftpipe.store import Store, StoreWriter, verify_store
from lftpipe.store.records import line_of, read_journal

FAR = 10**30


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "states.zarr"
    write(path, make_spec())
    return path


@pytest.fixture
def path(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "states.zarr")


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("array", ["hidden", "attention", "tokens"])
def test_two_shards_that_changed_places_are_noticed_by_the_reader(tmp_path, dtype, array):
    path = tmp_path / "states.zarr"
    write(path, make_spec(dtype=dtype, context=8))
    end = ".0" if array == "tokens" else ".0.0"
    front = "c." if array == "tokens" else "c.0."
    one, two = (path / f"train/{array}/{front}{index}{end}" for index in (0, 1))
    one.rename(path / "x")
    two.rename(one)
    (path / "x").rename(two)
    store = Store.open(path)
    with pytest.raises(StoreError, match=rf"{array} of train, shard 0: .* not the shard .*lftpipe verify"):
        store.tokens("train", [0]) if array == "tokens" else store.read("train", 2, [0], array=array)
    assert verify_store(path).shards == [("train", 0), ("train", 1)]


def test_a_store_without_tails_is_damaged(path):
    def strip(manifest):
        manifest["shards"] = {file: record[:3] for file, record in manifest["shards"].items()}

    reseal(path / "manifest.json", strip)
    with pytest.raises(StoreError, match=r"is not listed with its \d+ sequences and its tail"):
        Store.open(path)


def set_at(value: Any, place: tuple[Any, ...], new: Any) -> None:
    for step in place[:-1]:
        value = value[step]
    value[place[-1]] = new


SHARD = "train/hidden/c.0.0.0.0"


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("spec", "sequences", "train"), FAR),
        (("spec", "sequences", "train"), 2**46),
        (("spec", "sequences", "train"), -1),
        (("spec", "sequences", "train"), 10.0),
        (("spec", "sequences", "train"), True),
        (("spec", "sequences", "../../x"), 0),
        (("spec", "sequences"), []),
        (("spec", "context"), FAR),
        (("spec", "context"), 10**12),
        (("spec", "width"), "40"),
        (("spec", "width"), 41),
        (("spec", "sequences_per_shard"), 10**9),
        (("spec", "sequences_per_shard"), 0),
        (("spec", "layers"), [0, 2, FAR]),
        (("spec", "layers"), 3),
        (("spec", "layers"), []),
        (("spec", "dtype"), "int4"),
        (("spec", "dtype"), None),
        (("spec", "identity"), []),
        (("spec", "schema_version"), 2),
        (("spec", "surprise"), 1),
        (("spec",), None),
        (("shards",), {}),
        (("shards",), []),
        (("shards", SHARD), [4, 1]),
        (("shards", SHARD), None),
        (("shards", SHARD, 0), 3),
        (("shards", SHARD, 1), 10**15),
        (("shards", SHARD, 2), "../.."),
        (("shards", SHARD, 3), 7),
        (("shards", "../../etc/passwd"), [0, 0, ""]),
        (("metadata", "../zarr.json"), [0, 0, ""]),
        (("metadata",), 1),
        (("fingerprint",), None),
        (("fingerprint",), "0" * 32),
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_is_refused_in_one_line(path, place, new):
    reseal(path / "manifest.json", lambda manifest: set_at(manifest, place, new))
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: .*lftpipe verify") as caught:
        Store.open(path).read("train", 2, [0])
    assert "\n" not in str(caught.value)
    assert not verify_store(path).ok
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        StoreWriter.open(path, make_spec())
    assert time.monotonic() - started < 10
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [at] if at else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        found += places(each, (*at, key))
    return found


STRANGE = (None, True, -1, 0, 1, 7, 10**12, FAR, 1.5, 1e300, "", "x", "../../x", "\0", [], [[]], {}, {"x": 1})


def test_random_changes_of_a_sealed_manifest_give_the_same_states_or_one_line(path):
    manifest = read_sealed(path / "manifest.json")
    want = states(make_spec(), "train", "hidden", 2, range(10)).astype(np.float16)
    rng, refused = np.random.default_rng(0), 0
    everywhere = places(manifest)
    changes = cases(100, most=400)
    for _ in range(changes):
        changed = copy.deepcopy(manifest)
        set_at(changed, everywhere[rng.integers(len(everywhere))], STRANGE[rng.integers(len(STRANGE))])
        write_sealed(path / "manifest.json", changed)
        verify_store(path)
        try:
            store = Store.open(path)
            np.testing.assert_array_equal(store.read("train", 2, range(10)), want)
        except StoreError:
            refused += 1
    assert refused > 0.75 * changes


def journal_of(path: Path) -> list[Any]:
    """A store in the making with two shards of four; its journal's lines."""
    spec = make_spec()
    with StoreWriter.open(path, spec) as writer:
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        for key in writer.pending()[:2]:
            with writer.shard(key) as shard:
                fill(shard, spec)
    header, records = read_journal(path) or (None, {})
    assert header is not None
    return [header.to_json(), {file: list(record) for file, record in records.items()}]


def test_random_changes_of_a_journal_are_refused_or_lose_only_work(whole, tmp_path):
    lines = journal_of(tmp_path / "begun")
    rng, refused, finished = np.random.default_rng(1), 0, 0
    outside = tmp_path / "x.partial"
    outside.write_text("not the store's")
    for number in range(cases(30, most=150)):
        changed = copy.deepcopy(lines)
        if number % 3:
            part = changed[number % 2]
            everywhere = places(part)
            set_at(part, everywhere[rng.integers(len(everywhere))], STRANGE[rng.integers(len(STRANGE))])
        else:  # a line that was never written
            del changed[1][list(changed[1])[rng.integers(len(changed[1]))]]
        path = shutil.copytree(tmp_path / "begun", tmp_path / f"{number}")
        (path / "journal.jsonl").write_bytes(b"".join(map(line_of, changed)))
        with pytest.raises(StoreError, match=r"store holds \d+ of \d+ shards|is damaged"):
            Store.open(path)
        try:
            write(path, make_spec())
        except StoreError:
            refused += 1
        else:
            finished += 1
            assert verify_store(path).ok
            assert files(path).keys() == files(whole).keys()
        shutil.rmtree(path)
    assert outside.read_text() == "not the store's"
    assert min(refused, finished) >= 5


def test_a_journal_that_names_files_outside_is_refused(tmp_path):
    lines = journal_of(tmp_path / "states.zarr")
    lines[1]["../../victim"] = [1, 3, "0" * 32]
    (tmp_path / "states.zarr/journal.jsonl").write_bytes(b"".join(map(line_of, lines)))
    with pytest.raises(StoreError, match=r"'\.\./\.\./victim' is no file of a store"):
        StoreWriter.open(tmp_path / "states.zarr", make_spec())
