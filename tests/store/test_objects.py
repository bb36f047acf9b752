"""A store in a bucket keeps the promises of one in a folder: the same tests on both."""

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_states
import numpy as np
import pytest
from fake_states import fill, make_spec, states, tokens, write
from s3_server import make_bucket

from lftpipe.base.errors import StoreBusyError, StoreError
from lftpipe.storage import storage_of, writable_storage_of
from lftpipe.storage.bucket import BucketStorage
from lftpipe.storage.places import mirror_of
from lftpipe.store import Store, StoreWriter, verify_store

SMALL, LARGE = {"train": 10, "validation": 0}, {"train": 18, "validation": 5}


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, monkeypatch) -> Iterator[Callable[[str], Path]]:
    """Where a store of some name goes."""
    if request.param == "folder":
        yield lambda name: tmp_path / name
        return
    monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LFTPIPE_RETRY_SECONDS", "3")
    endpoint = request.getfixturevalue("server")
    url = make_bucket(endpoint, f"bucket{next(NUMBERS)}")
    yield lambda name: mirror_of(f"{url}/experiment") / name


NUMBERS = itertools.count()


def content(path: Path) -> dict[str, bytes]:
    """Every file of a store, but for the lock."""
    storage = storage_of(path)
    if isinstance(storage, BucketStorage):
        return {name: storage.read(name) for name, _ in storage.entries()}
    return {name: data for name, data in fake_states.files(path).items() if name != "writer.lock"}


def flip(path: Path, name: str, at: int) -> None:
    storage = writable_storage_of(path)
    data = bytearray(storage.read(name))
    data[at] ^= 1
    storage.write(name, bytes(data))


def check(path: Path, spec, store: Store | None = None) -> None:
    store = store or Store.open(path)
    for split, count in spec.sequences.items():
        np.testing.assert_array_equal(store.tokens(split), tokens(spec, split)[0])
        for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
            for layer in layers:
                want = states(spec, split, array, layer, range(count)).astype(spec.decoded_dtype)
                np.testing.assert_array_equal(store.read(split, layer, range(count), array=array), want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_what_is_written_is_what_is_read_and_the_same_bytes_anywhere(place, tmp_path, dtype):
    spec = make_spec(dtype=dtype)
    path = place("states.zarr")
    write(path, spec)
    write(tmp_path / "there", spec)
    assert content(path) == content(tmp_path / "there")
    assert verify_store(path).ok
    if dtype != "int8":
        check(path, spec)
    store = pickle.loads(pickle.dumps(Store.open(path)))
    batch = next(iter(store.batches("train", [0, 3], batch_size=4, seed=1, attention_layers=[2])))
    there = next(iter(Store.open(tmp_path / "there").batches("train", [0, 3], batch_size=4, seed=1)))
    np.testing.assert_array_equal(batch.states[3], there.states[3])
    if storage_of(path).remote:  # nothing of the states stays on this machine
        assert not [file for file in path.rglob("*") if file.is_file() and file.name.startswith("c.")]


def test_a_store_is_missing_then_begun_then_complete(place):
    path, spec = place("states.zarr"), make_spec()
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(path)
    with StoreWriter.open(path, spec) as writer:
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        with writer.shard(writer.pending()[0]) as shard:
            fill(shard, spec)
    with pytest.raises(StoreError, match="store holds 1 of 4 shards"):
        Store.open(path)
    assert len(write(path, spec)) == 3
    check(path, spec)
    assert write(path, spec) == []


def test_settings_are_never_mixed(place):
    path = place("states.zarr")
    write(path, make_spec())
    other = make_spec(identity={"teacher": {"name": "fake", "revision": "b2"}, "seed": 0})
    with pytest.raises(StoreError, match=r"teacher\.revision: 'a1' -> 'b2'"):
        StoreWriter.open(path, other)
    with pytest.raises(StoreError, match="a new store"):
        StoreWriter.open(path, make_spec(), resume=False)
    with StoreWriter.open(path, other, force=True):
        pass
    with pytest.raises(StoreError, match="store holds 0 of 4 shards"):
        Store.open(path)


@pytest.mark.slow
def test_a_store_grows_under_an_open_reader(place, tmp_path):
    path, small, large = place("states.zarr"), make_spec(sequences=SMALL), make_spec(sequences=LARGE)
    write(path, small)
    opened, lazy = Store.open(path), Store.open(path)
    opened.read("train", 2, range(10))
    with StoreWriter.open(path, large) as writer:
        for split in LARGE:
            writer.put_tokens(split, *tokens(large, split))
        for key in writer.pending():
            with writer.shard(key) as shard:
                fill(shard, large)
            check(path, small, opened)
            check(path, small)
        writer.finish()
    check(path, small, opened)
    check(path, small, lazy)
    check(path, large)
    assert verify_store(path).ok


def test_damage_is_found_named_and_mended(place):
    path = place("states.zarr")
    write(path, make_spec())
    before = content(path)
    flip(path, "train/hidden/c.0.1.0.0", 99)
    writable_storage_of(path).delete("validation/attention/c.0.0.0.0")
    with pytest.raises(StoreError, match=r"hidden of train, shard 1: chunk 0 .*damaged"):
        Store.open(path).read("train", 0, [4])
    with pytest.raises(StoreError, match="attention of validation, shard 0: "):
        Store.open(path).read("validation", 2, [0], array="attention")
    report = verify_store(path)
    assert report.shards == [("train", 1), ("validation", 0)]
    assert [key.index for key in write(path, make_spec(), repair=report)] == [1, 0]
    assert content(path) == before
    flip(path, "manifest.json", 40)
    with pytest.raises(StoreError, match="is damaged"):
        Store.open(path)
    assert write(path, make_spec(), repair=verify_store(path)) == []
    assert content(path) == before


def test_two_writers_are_never_both_right(place):
    """In a folder the second is refused; in a bucket, from another machine, the first is."""
    path, spec = place("states.zarr"), make_spec()
    first = StoreWriter.open(path, spec)
    with pytest.raises(StoreError, match="is being written by another process"):
        StoreWriter.open(path, spec)
    if storage_of(path).remote:
        (path / "writer.lock").unlink()  # as on another machine
        with StoreWriter.open(path, spec) as second:
            for split in spec.sequences:
                second.put_tokens(split, *tokens(spec, split))
            with pytest.raises(StoreError, match="is being written by another process"):
                first.put_tokens("train", *tokens(spec, "train"))
            with pytest.raises(StoreError, match="is being written by another process"):
                first.note(late=True)
        write(path, spec)
        with pytest.raises(StoreError, match="is being written by another process"):
            first.put_tokens("train", *tokens(spec, "train"))
    first.close()
    write(path, spec)
    check(path, spec)
    assert verify_store(path).ok


@pytest.mark.slow
def test_a_writer_on_another_machine_is_refused_while_the_first_one_lives(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LFTPIPE_LEASE_SECONDS", "4")  # a busy machine renews late
    path, spec = Path(f"{make_bucket(server, 'leased')}/data/states.zarr"), make_spec()
    monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / "one"))
    first = StoreWriter.open(path, spec)
    monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / "two"))
    for force in (False, True):
        with pytest.raises(
            StoreBusyError, match=r"s3://leased/data/.* is being written by another process, on"
        ):
            StoreWriter.open(path, spec, force=force)
    first.put_tokens("train", *tokens(spec, "train"))  # it was not disturbed
    lease: Any = first.storage._lease  # pyright: ignore[reportAttributeAccessIssue]
    lease._stop.set()  # as if it were killed
    lease._thread.join()
    began = time.monotonic()
    write(path, spec)
    assert time.monotonic() - began >= 4
    with pytest.raises(StoreError, match="is being written by another process"):
        first.put_tokens("validation", *tokens(spec, "validation"))
    first.close()
    check(path, spec)
    assert not [name for name in content(path) if "lease" in name or "journal" in name]


class Killed(BaseException):
    """The process is gone."""


METHODS = ("write", "take", "begin_log", "append_log", "remove_log", "delete", "put", "_create", "_remove")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops", [(2, 15, 29), pytest.param(range(1, 200), marks=pytest.mark.long)], ids=["three", "every"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_request_and_resumed_it_is_the_same_store(server, tmp_path, monkeypatch, after, stops):
    """The driver dies before or after each thing it asks of the bucket; the next one has another machine."""
    spec = make_spec(sequences={"train": 6, "validation": 3})
    write(tmp_path / "there", spec)
    url = make_bucket(server, f"killed{after}{len(stops)}".lower())
    real = {name: getattr(BucketStorage, name) for name in METHODS}
    count, stop = 0, 0

    def watched(name):
        def call(self, *arguments):
            nonlocal count
            count += 1
            number = count
            if number == stop and not after:
                raise Killed
            result = real[name](self, *arguments)
            if number == stop:
                raise Killed
            return result

        return call

    for name in METHODS:
        monkeypatch.setattr(BucketStorage, name, watched(name))
    for stop in stops:
        count = 0
        monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / f"cache{stop}"))
        path = mirror_of(f"{url}/{stop}") / "states.zarr"
        try:
            write(path, spec)
        except Killed:
            pass
        else:
            assert stop > 30
            break
        stopped, stop = stop, 0
        monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / f"other{stopped}"))
        path = mirror_of(f"{url}/{stopped}") / "states.zarr"
        write(path, spec)
        assert content(path) == content(tmp_path / "there"), stopped
    else:
        assert len(stops) == 3, "it never ended"


def test_a_forked_process_is_told_to_be_spawned(server, tmp_path, monkeypatch):
    """Threads that move the bytes do not survive a fork: without a word it would wait for ever."""
    monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / "cache"))
    path = mirror_of(f"{make_bucket(server, 'forked')}/experiment") / "states.zarr"
    write(path, make_spec())
    storage = storage_of(path)
    assert isinstance(storage, BucketStorage)
    assert storage.client
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            storage.read("manifest.json")
        except StoreError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"start processes by spawn" in pipe.read()
