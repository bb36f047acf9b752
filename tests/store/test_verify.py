"""Every byte of a finished store is watched, and what is damaged can be made anew without the rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_states import files, fill, make_spec, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.store import Store, StoreWriter, verify_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "states.zarr"
    write(path, make_spec())
    return path


@pytest.fixture
def path(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "states.zarr")


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def test_a_whole_store_is_whole(whole):
    report = verify_store(whole)
    assert report.ok
    assert report.shards == []
    everything = files(whole)
    assert report.files == len(everything) - 1  # all but the lock
    assert report.bytes == sum(map(len, everything.values())) - len(everything["manifest.json"])


def damage_and_verify(path: Path, rng: np.random.Generator) -> None:
    """Flip a bit, cut, or delete; see it named; undo."""
    names = [name for name in files(path) if name != "writer.lock"]
    name = names[rng.integers(len(names))]
    file = path / name
    before = file.read_bytes()
    match rng.integers(4):
        case 0:
            file.write_bytes(before[: rng.integers(len(before))])
        case 1:
            file.unlink()
        case _:
            flip(file, int(rng.integers(len(before))), int(rng.integers(8)))
    report = verify_store(path)
    assert [damage.file for damage in report.damaged] == [name]
    if "/c." in name:
        split, array, key = name.split("/")
        (damage,) = report.damaged
        assert (damage.split, damage.array, key.split(".")[-3 if "." in key[4:] else -2]) == (
            split,
            array,
            str(damage.index),
        )
        assert report.shards == [(split, damage.index)]
        assert str(damage).startswith(f"{array} of {split}, shard {damage.index}: ")
    else:
        assert report.shards == []
    file.write_bytes(before)


def test_random_damage_is_found_and_named(path):
    rng = np.random.default_rng(0)
    for _ in range(40):
        damage_and_verify(path, rng)
    assert verify_store(path).ok


@pytest.mark.long
def test_a_thousand_random_damages_are_found_and_named(path):
    rng = np.random.default_rng(1)
    for _ in range(1000):
        damage_and_verify(path, rng)


def test_repair_writes_only_what_is_damaged(whole, path):
    untouched = {name: (path / name).stat().st_mtime_ns for name in files(path) if "/c." in name}
    flip(path / "train/hidden/c.0.1.0.0", 99)
    (path / "validation/attention/c.0.0.0.0").unlink()
    (path / "train/tokens/c.2.0").write_bytes(b"")
    flip(path / "train/zarr.json", 3)
    report = verify_store(path)
    assert report.shards == [("train", 1), ("train", 2), ("validation", 0)]
    written = write(path, make_spec(), repair=report)
    assert [(key.split, key.index) for key in written] == [("train", 1), ("validation", 0)]
    assert files(path) == files(whole)
    rewritten = {name for name, time in untouched.items() if (path / name).stat().st_mtime_ns != time}
    again = {
        f"{part}/c.0.{i}.0.0"
        for split, i in (("train", 1), ("validation", 0))
        for part in (f"{split}/hidden", f"{split}/attention")
    }
    assert rewritten == again | {"train/tokens/c.2.0", "train/document/c.2.0"}


def test_a_repair_may_be_interrupted(whole, path):
    flip(path / "train/hidden/c.0.1.0.0", 99)
    flip(path / "train/hidden/c.0.2.0.0", 99)
    with StoreWriter.open(path, make_spec(), repair=verify_store(path)) as writer:
        assert not writer.complete
        with writer.shard(writer.pending()[0]) as shard:
            fill(shard, make_spec())
    assert [key.index for key in write(path, make_spec())] == [2]
    assert files(path) == files(whole)


def test_metadata_alone_is_repaired_without_a_teacher(whole, path):
    (path / "zarr.json").write_bytes(b"{}")
    assert write(path, make_spec(), repair=verify_store(path)) == []
    assert files(path) == files(whole)


@pytest.mark.parametrize("lose", [lambda file: file.unlink(), lambda file: flip(file, 40)])
def test_a_lost_manifest_is_made_anew_from_the_shards(whole, path, lose):
    lose(path / "manifest.json")
    flip(path / "train/attention/c.0.0.0.0", 5)
    report = verify_store(path)
    assert [damage.file for damage in report.damaged] == ["manifest.json"]
    with pytest.raises(StoreError, match=r"no store|is damaged"):
        Store.open(path)
    with pytest.raises(StoreError, match=r"without its manifest|is damaged"):
        StoreWriter.open(path, make_spec())
    other = make_spec(identity={"teacher": {"name": "fake", "revision": "b2"}, "seed": 0})
    with pytest.raises(StoreError, match=r"teacher\.revision: 'a1' -> 'b2'"):
        StoreWriter.open(path, other, repair=report)
    assert [(key.split, key.index) for key in write(path, make_spec(), repair=report)] == [("train", 0)]
    assert files(path) == files(whole)


def test_without_manifest_and_metadata_there_is_no_cure(path):
    flip(path / "manifest.json", 40)
    (path / "zarr.json").write_bytes(b"{}")
    with pytest.raises(StoreError, match=r"manifest and metadata of .* are both damaged"):
        StoreWriter.open(path, make_spec(), repair=verify_store(path))


def test_bytes_between_the_chunks_do_not_pass_for_a_shard(whole, path):
    """Salvage trusts a shard only if its checksums cover the whole file."""
    (path / "manifest.json").unlink()
    file = path / "train/hidden/c.0.0.0.0"
    data = file.read_bytes()
    index = 16 * 3 * 4 + 4
    file.write_bytes(data[:-index] + b"gap" + data[-index:])
    assert [key.index for key in write(path, make_spec(), repair=verify_store(path))] == [0]
    assert files(path) == files(whole)


def test_no_store_and_an_incomplete_one_cannot_be_verified(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        verify_store(tmp_path / "nothing")
    with StoreWriter.open(tmp_path / "begun", make_spec()):
        pass
    with pytest.raises(StoreError, match="store holds 0 of 4 shards"):
        verify_store(tmp_path / "begun")


def test_a_store_of_a_later_version_is_refused(path):
    from lftpipe.base.files import read_sealed, write_sealed

    manifest = read_sealed(path / "manifest.json")
    manifest["spec"]["schema_version"] = 2
    write_sealed(path / "manifest.json", manifest)
    with pytest.raises(StoreError, match="schema version 2, this lftpipe reads 1"):
        Store.open(path)


def test_tokens_alone_are_repaired_without_a_teacher(whole, path):
    flip(path / "train/document/c.0.0", 3)
    assert write(path, make_spec(), repair=verify_store(path)) == []
    assert files(path) == files(whole)
    assert json.loads((path / "zarr.json").read_text())["attributes"]["complete"]
    np.testing.assert_array_equal(Store.open(path).document("train"), tokens(make_spec(), "train")[1])


def test_damaged_tokens_of_a_complete_store_are_named_when_tokens_are_compared(path):
    flip(path / "train/tokens/c.0.0", 3)
    with StoreWriter.open(path, make_spec()) as writer:
        assert writer.complete
        with pytest.raises(StoreError, match=r"chunk 0 of .*tokens/c\.0\.0 is damaged .*--repair"):
            writer.put_tokens("train", *tokens(make_spec(), "train"))
