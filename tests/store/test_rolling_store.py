"""A store whose training states come and go: what is there, what may go, and that it comes back the same."""

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_states import fill, make_spec, states, tokens

from lftpipe.base.errors import StoreError
from lftpipe.store import (
    Reader,
    Roll,
    Store,
    StoreWriter,
    arrivals,
    produce_shard,
    producing,
    register,
    registered,
    unregister,
    verify_store,
)
from lftpipe.store.windows import most_bytes

#: Ten shards of four sequences, the last with two, in windows of two shards.
SPEC = make_spec(rolling=2, sequences={"train": 38, "validation": 3})
SHARD = most_bytes(SPEC, 4)
STAYS = most_bytes(SPEC, 3)

#: Two windows, and what stays.
CAP = STAYS + 4 * SHARD


@contextmanager
def begun(path: Path, cap: int = CAP, spec=SPEC) -> Iterator[tuple[StoreWriter, Roll]]:
    """A producer that has tokens and validation ready for runs."""
    with StoreWriter.open(path, spec) as writer, producing(path):
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        roll = Roll(writer, cap)
        for key in roll.stays:
            with writer.shard(key) as shard:
                fill(shard, spec)
        roll.publish()
        yield writer, roll


def make(writer: StoreWriter, roll: Roll, readers: list[Reader], change: float = 0.0) -> list[int]:
    """Make all that there is room for; which shards of `train` were made."""
    made = []
    while key := roll.next(readers):
        made.append(key.index)
        attempt = f"e{len(made)}-{os.urandom(4).hex()}"
        with produce_shard(writer.path, SPEC, key, attempt) as shard:
            for first in range(0, len(key.sequences), 3):
                rows = key.sequences[first : first + 3]
                for array, layers in (("hidden", SPEC.layers), ("attention", SPEC.attention_layers)):
                    for layer in layers:
                        block = states(SPEC, key.split, array, layer, rows) + change
                        shard.put(array, layer, first, block)
        assert shard.sealed is not None
        roll.commit(shard.sealed)
    return made


def there(path: Path) -> set[int]:
    """Shards of `train` on the disk."""
    return {int(file.name.split(".")[2]) for file in path.glob("train/hidden/c.*")}


def reader(tmp_path: Path, position: int, name: str = "run", **changes) -> Reader:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "settings.toml").touch()
    given = {
        "run": str(folder),
        "begun": str(folder / "settings.toml"),
        "finished": str(folder / "manifest.json"),
        "position": position,
        "end": 1000,
        "batch": 2,
    }
    return Reader(**given | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states.zarr"


def test_windows_are_dropped_once_every_run_has_passed_them(path, tmp_path):
    with begun(path) as (writer, roll):
        assert make(writer, roll, []) == [0, 1, 2, 3]  # as much as fits, before any run has come
        one, two = reader(tmp_path, 9, "one"), reader(tmp_path, 6, "two")
        assert make(writer, roll, [one, two]) == []
        assert there(path) == {0, 1, 2, 3}
        assert make(writer, roll, [one, replace(two, position=8)]) == [4, 5]
        assert there(path) == {2, 3, 4, 5}
        assert roll.summary()[2:] == (2, CAP)


def test_the_windows_go_round_until_the_last_run_ends(path, tmp_path):
    with begun(path) as (writer, roll):
        assert make(writer, roll, [reader(tmp_path, 30)]) == [6, 7, 8, 9]
        assert make(writer, roll, [reader(tmp_path, 35)]) == [0, 1]  # the second epoch's first
        assert there(path) == {8, 9, 0, 1}
        assert make(writer, roll, [reader(tmp_path, 40, end=44)]) == []
        assert there(path) == {0, 1}  # nobody needs another one


def test_the_hindmost_run_comes_first(path, tmp_path):
    with begun(path) as (writer, roll):
        ahead = reader(tmp_path, 25, "ahead")
        make(writer, roll, [ahead])
        assert there(path) == {6, 7, 8, 9}
        assert make(writer, roll, [ahead, reader(tmp_path, 0, "late")]) == [0, 1, 2, 3]
        assert there(path) == {0, 1, 2, 3}


def test_a_batch_that_needs_a_short_window_too_may_exceed_the_cap_by_it(path, tmp_path):
    with begun(path) as (writer, roll):
        # The last window has 6 sequences: from the last but one, batches of 4 may reach the next epoch.
        make(writer, roll, [reader(tmp_path, 24, batch=4)])
        assert there(path) == {6, 7, 8, 9, 0, 1}
        assert CAP < roll.summary().peak_bytes < CAP + 2 * SHARD


def test_a_dropped_shard_comes_back_the_same_to_the_byte(path, tmp_path):
    with begun(path) as (writer, roll):
        make(writer, roll, [reader(tmp_path, 0)])
        before = {file.name: file.read_bytes() for file in path.glob("train/*/c.*")}
        make(writer, roll, [reader(tmp_path, 16)])
        make(writer, roll, [reader(tmp_path, 0)])
        assert {file.name: file.read_bytes() for file in path.glob("train/*/c.*")} == before
        assert roll.summary().made_again == 4


def test_a_shard_made_again_with_other_bytes_is_refused(path, tmp_path):
    with begun(path) as (writer, roll):
        make(writer, roll, [reader(tmp_path, 0)])
        make(writer, roll, [reader(tmp_path, 16)])
    with begun(path) as (writer, roll):  # another process knows it too
        with pytest.raises(StoreError, match=r"c\.0\.0\.0\.0 of .*, made again with other bytes than before"):
            make(writer, roll, [reader(tmp_path, 0)], change=1.0)
        assert not list(path.rglob("*.partial"))
        assert 0 not in there(path)


def test_what_a_kill_leaves_of_a_shard_that_was_being_dropped_goes(path, tmp_path):
    with begun(path) as (writer, roll):
        make(writer, roll, [])
    (path / "train/hidden/c.0.1.0.0").unlink()
    with begun(path) as (writer, roll):
        assert not (path / "train/attention/c.0.1.0.0").exists()
        assert make(writer, roll, []) == [1]


def test_it_is_read_as_far_as_it_is_there(path):
    with begun(path) as (writer, roll):
        make(writer, roll, [])
        store = Store.open(path)
        want = states(SPEC, "train", "hidden", 2, [15, 0]).astype(np.float16)
        np.testing.assert_array_equal(store.read("train", 2, [15, 0]), want)
        np.testing.assert_array_equal(store.tokens("train"), tokens(SPEC, "train")[0])
        assert store.read("validation", 0, [0, 1, 2]).shape == (3, 6, 40)
        with pytest.raises(StoreError, match="hidden of train, shard 4, which this rolling store does not"):
            store.read("train", 2, [16])
        with pytest.raises(StoreError, match="the map on the rolling store"):
            store.need_whole("the map")


def test_batches_wait_for_what_is_not_there_and_end_while_they_wait(path, tmp_path):
    said: list[str] = []
    with begun(path) as (writer, roll):
        make(writer, roll, [])
        batches = Store.open(path).batches("train", [2], batch_size=4, seed=0, say=said.append)
        for _ in range(4):
            next(batches)
        later = threading.Timer(0.3, lambda: make(writer, roll, [reader(tmp_path, 16)]))
        later.start()
        fifth = next(batches)
        later.join()
        assert set(fifth.sequences.tolist()) < set(range(16, 24))
        want = states(SPEC, "train", "hidden", 2, fifth.sequences.tolist()).astype(np.float16)
        np.testing.assert_array_equal(fifth.states[2], want)
        assert isinstance(batches, Generator)
        batches.close()  # its thread waits for windows that nobody makes
    assert not any(thread.name == "lftpipe-batches" for thread in threading.enumerate())


def test_who_waits_says_so_and_gives_up_without_a_producer(path, monkeypatch):
    monkeypatch.setattr(arrivals, "PATIENCE", 0.5)
    monkeypatch.setattr(arrivals, "SILENT", 0.1)
    with begun(path) as (writer, roll):
        make(writer, roll, [])
    said: list[str] = []
    batches = Store.open(path).batches("train", [2], batch_size=4, seed=0, start_step=4, say=said.append)
    with pytest.raises(StoreError, match=r"c\.0\.\d\.0\.0 of the rolling store .*, without a process that"):
        next(batches)
    assert said == [f"waiting for window 2 of {path} (nobody makes it: run `lftpipe extract --rolling`)"]


def test_the_files_of_passed_windows_are_closed(path, tmp_path):
    """A file that is open takes room on the disk, dropped or not."""
    with begun(path) as (writer, roll):
        make(writer, roll, [])
        batches = Store.open(path).batches("train", [2], batch_size=4, seed=0, prefetch=0)
        for _ in range(3):
            next(batches)
        make(writer, roll, [reader(tmp_path, 12)])
        links = (str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        assert not [link for link in links if str(path) in link and "(deleted)" in link]


def test_a_rolling_store_keeps_its_windows_and_its_size(path):
    with begun(path):
        pass
    for other, what in (
        (make_spec(sequences=SPEC.sequences), "rolling: 2 -> None"),
        (replace(SPEC, rolling=3), "rolling: 2 -> 3"),
        (replace(SPEC, sequences={"train": 50, "validation": 3}), "50.* for the rolling store"),
    ):
        with pytest.raises(StoreError, match=what):
            StoreWriter.open(path, other)


def test_verify_checks_what_is_there_and_counts_what_is_not(path, tmp_path):
    with begun(path) as (writer, roll):
        make(writer, roll, [reader(tmp_path, 16)])
        report = verify_store(path)
        assert (report.ok, report.absent) == (True, 6)
    file = path / "train/hidden/c.0.5.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert [str(damage) for damage in verify_store(path).damaged] == [
        "hidden of train, shard 5: bytes differ from those written (train/hidden/c.0.5.0.0)"
    ]
    with StoreWriter.open(path, SPEC, repair=verify_store(path)) as writer:
        assert make(writer, Roll(writer, CAP), [reader(tmp_path, 16)]) == [5]
    assert verify_store(path).ok
    (path / "journal.jsonl").write_bytes(b"nothing\n")
    assert [damage.file for damage in verify_store(path).damaged] == ["journal.jsonl"]


def test_runs_that_are_over_are_taken_off(path, tmp_path):
    path.mkdir()
    one, two, three = (reader(tmp_path, 5, name) for name in ("one", "two", "three"))
    for each in (one, two, three):
        register(path, each)
    register(path, replace(one, position=9))
    assert sorted(each.position for each in registered(path).values()) == [5, 5, 9]
    Path(two.finished).touch()
    Path(three.begun).unlink()
    assert list(registered(path).values()) == [replace(one, position=9)]
    assert {file.name for file in (path / "readers").iterdir()} == {one.name, "left"}
    (path / "readers" / one.name).write_text("{}")
    with pytest.raises(StoreError, match=f"damaged .*{one.name}"):
        registered(path)
    unregister(path, one)
    assert registered(path) == {}
