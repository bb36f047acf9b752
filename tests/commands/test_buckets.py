"""The whole pipeline on a bucket, what a bucket refuses, and what the cache keeps."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from fake_states import files, make_spec, write
from object_server import Proxy
from s3_server import make_bucket

from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.commands import evaluate, extract, info, recouple, train, verify
from lftpipe.config.settings import (
    EvaluateSettings,
    ExtractSettings,
    InfoSettings,
    RecoupleSettings,
    TrainSettings,
    VerifySettings,
)
from lftpipe.storage import bucket, mirror, storage_of, url_of
from lftpipe.storage.bucket import BucketStorage, RangeCache
from lftpipe.storage.hub import HubStorage
from lftpipe.storage.places import mirror_of
from lftpipe.store import Store


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine that never saw a bucket."""
    monkeypatch.setenv("LFTPIPE_CACHE", str(tmp_path / "machine"))
    monkeypatch.setenv("LFTPIPE_RETRY_SECONDS", "3")
    return tmp_path


def another_machine(machine: Path, monkeypatch) -> None:
    monkeypatch.setenv("LFTPIPE_CACHE", str(machine / "another"))


@pytest.mark.parametrize("given", ["workspace", pytest.param("store", marks=pytest.mark.slow)])
def test_the_whole_pipeline_works_on_a_bucket_as_on_a_folder(
    server, machine, monkeypatch, teachers, text_folder, given
):
    url = make_bucket(server, f"pipeline-{given}")
    place = (
        {"workspace": f"{url}/files"} if given == "workspace" else {"store": f"{url}/files/neox/states.zarr"}
    )
    small = {"context": 32, "tokens": 48 * 32, "validation_tokens": 7 * 32, "batch_tokens": 256}
    texts = {"model": str(teachers["neox"]), "corpus": str(text_folder), "compute_dtype": "float32", **small}
    made = mirror.run(extract.extract, ExtractSettings(**texts, **place))
    assert made["store"] == f"{url}/files/neox/states.zarr"
    assert "machine" not in str(made)
    local = extract.extract(ExtractSettings(**texts, workspace=machine / "data"))
    assert made["bytes"] == local["bytes"]
    assert mirror.run(extract.extract, ExtractSettings(**texts, **place))["already_complete"]
    another_machine(machine, monkeypatch)
    assert mirror.run(verify.verify, VerifySettings(**place))["ok"]
    there = mirror.run(info.info, InfoSettings(**place))
    assert there["fingerprint"] == info.info(InfoSettings(workspace=machine / "data"))["fingerprint"]
    mirror.run(recouple.recouple, RecoupleSettings(**place, tokens=16, batches=2))
    few = {"block": "1:3", "tokens": 256, "batch_tokens": 64, "run": "first"}
    mirror.run(train.train, TrainSettings(**place, **few))
    monkeypatch.setenv("LFTPIPE_CACHE", str(machine / "third"))
    scored = mirror.run(evaluate.evaluate, EvaluateSettings(**place, runs=("first",)))
    train.train(TrainSettings(workspace=machine / "data", **few))
    here = evaluate.evaluate(EvaluateSettings(workspace=machine / "data", runs=("first",)))
    assert [row["kl"] for row in scored["rows"]] == [row["kl"] for row in here["rows"]]
    names = {name for name, _ in BucketStorage(f"{url}/files/neox").entries()}
    assert names >= {
        "recoupling.json",
        "results.json",
        "runs/first/manifest.json",
        "states.zarr/manifest.json",
    }
    assert not [name for name in names if name.endswith((".partial", ".lock", "mirror.json"))]


@pytest.mark.parametrize("given", [{"part": "1/2"}, {"ray": "auto"}], ids=["part", "ray"])
def test_work_is_not_shared_with_machines_that_would_not_see_the_files(server, teachers, text_folder, given):
    url = make_bucket(server, f"shared-{min(given)}")
    settings = ExtractSettings(
        model=str(teachers["neox"]), corpus=str(text_folder), context=32, workspace=f"{url}/files", **given
    )
    with pytest.raises(
        SettingsError, match=r"with a store at s3://shared-.* a folder that all machines share"
    ):
        mirror.run(extract.extract, settings)


def test_files_that_changed_on_two_machines_are_refused(server, machine, monkeypatch):
    url = f"{make_bucket(server, 'two-machines')}/files"
    folders = []
    for name in ("one", "two"):
        monkeypatch.setenv("LFTPIPE_CACHE", str(machine / name))
        folders.append(mirror_of(url))
    one, two = (mirror.Mirror(url, folder, set()) for folder in folders)
    (one.folder / "a/b").mkdir(parents=True)
    (one.folder / "a/b/notes.json").write_text("1")
    one.push()
    two.pull()
    assert (two.folder / "a/b/notes.json").read_text() == "1"
    (two.folder / "a/b/notes.json").write_text("22")
    two.push()
    one.pull()
    assert (one.folder / "a/b/notes.json").read_text() == "22"
    (one.folder / "a/b/notes.json").write_text("333")
    (two.folder / "a/b/notes.json").write_text("4444")
    two.push()
    with pytest.raises(StoreError, match=r"a/b/notes\.json, which changed in s3://two-machines/files and in"):
        one.pull()
    (one.folder / "a/b/notes.json").unlink()
    one.pull()
    assert (one.folder / "a/b/notes.json").read_text() == "4444"
    (one.folder / "a/b/notes.json").unlink()
    one.push()
    two.pull()
    assert not (two.folder / "a/b/notes.json").exists()


def test_a_bucket_that_is_not_there_is_one_line(server):
    with pytest.raises(StoreError, match=r"s3://nowhere/files.*bucket is not there .* make it first"):
        mirror.run(info.info, InfoSettings(store="s3://nowhere/files/states.zarr"))
    with pytest.raises(StoreError, match=r"s3://nowhere.*bucket is not there"):
        write(Path("s3://nowhere/files/states.zarr"), make_spec())


def test_missing_credentials_are_one_line(server, monkeypatch):
    url = make_bucket(server, "secret")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"s3://secret/files.*: no access .* set AWS_ACCESS_KEY_ID"):
        Store.open(Path(f"{url}/files/states.zarr"))


def test_a_server_that_is_gone_is_one_line_within_seconds(monkeypatch, server):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StoreError, match=r"s3://gone/files.* cannot be reached .* network and endpoint"
    ) as caught:
        Store.open(Path("s3://gone/files/states.zarr"))
    assert "\\n" not in str(caught.value)


@pytest.mark.slow
def test_connections_that_are_cut_are_tried_again(server, monkeypatch, machine):
    url = make_bucket(server, "cut")
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("LFTPIPE_RETRY_SECONDS", "20")
    path = Path(f"{url}/files/states.zarr")
    stop = threading.Event()

    def misbehave() -> None:
        while not stop.wait(0.3):
            proxy.cut = 1

    thread = threading.Thread(target=misbehave)
    thread.start()
    try:
        write(path, make_spec())
        read = []
        while len(read) < 5 or (proxy.refused <= 3 and len(read) < 100):  # a quick machine meets few cuts
            read.append(Store.open(path).read("train", 2, range(10)))
    finally:
        stop.set()
        thread.join()
        proxy.close()
    write(machine / "there", make_spec())
    want = Store.open(machine / "there").read("train", 2, range(10))
    for each in read:
        np.testing.assert_array_equal(each, want)
    assert proxy.refused > 3


@contextmanager
def answering(monkeypatch, status: str, body: bytes) -> Iterator[None]:
    """A server whose first two answers break off in their body."""
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for content in (body[:9], body[:9], body):
                client, _ = listener.accept()
                with client:
                    client.recv(2**16)
                    client.sendall(head + content)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield
        thread.join(30)
    assert not thread.is_alive()


def test_an_answer_that_breaks_off_while_it_says_that_nothing_is_there_is_asked_for_again(
    server, monkeypatch
):
    with (
        answering(monkeypatch, "404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"),
        pytest.raises(FileNotFoundError, match="no such object"),
    ):
        BucketStorage("s3://missing/files").read("nothing.json")


@pytest.mark.parametrize("ask", [BucketStorage.entries, BucketStorage.names], ids=["flat", "by-folder"])
def test_a_list_that_breaks_off_is_asked_for_again(server, monkeypatch, ask):
    with answering(monkeypatch, "200 OK", b"<ListBucketResult><Name>x</Name></ListBucketResult>"):
        assert not ask(BucketStorage("s3://missing/files"))


def test_a_large_object_is_put_in_parts(server, machine, monkeypatch):
    monkeypatch.setattr(bucket, "PART_BYTES", 5 * 2**20)
    storage = BucketStorage(make_bucket(server, "parts"))
    data = np.random.default_rng(0).integers(0, 256, 12 * 2**20, np.uint8).tobytes()
    (machine / "a").mkdir()
    (machine / "a/large").write_bytes(data)
    storage.take(machine, ["a/large"])
    assert not (machine / "a/large").exists()
    assert storage.read("a/large") == data
    assert storage.digest("a/large") == xxhash.xxh3_128_hexdigest(data)
    opened = storage.open("a/large", 100, 7)  # it should have had another size
    assert (opened.size, opened.end) == (len(data), data[-100:])
    for wrong in (len(data) + 1, 2 * len(data)):
        assert storage.open("a/large", 100, wrong).end == data[-100:]


@pytest.mark.slow
def test_a_put_that_fails_for_good_is_one_line_and_loses_nothing(server, machine, monkeypatch):
    path = Path(f"{make_bucket(server, 'failing')}/files/states.zarr")
    real, asked = BucketStorage.put, []

    def put(self, name: str, content: Path | bytes) -> str:
        if isinstance(content, Path):
            asked.append(name)
        if len(asked) == 5 and isinstance(content, Path):
            raise StoreError(f"{self.where} cannot be reached", "an object store that answers", "wait")
        return real(self, name, content)

    monkeypatch.setattr(BucketStorage, "put", put)
    with pytest.raises(StoreError, match="cannot be reached"):
        write(path, make_spec())
    with pytest.raises(StoreError, match=r"store holds \d of 4 shards"):
        Store.open(path)
    write(path, make_spec())
    write(machine / "there", make_spec())
    storage = storage_of(path)
    for name, data in files(machine / "there").items():
        if name != "writer.lock":
            assert storage.read(name) == data


@pytest.fixture
def stored(server, request) -> str:
    url = f"{make_bucket(server, 'kept-' + str(abs(hash(request.node.name))))}/files"
    write(Path(f"{url}/states.zarr"), make_spec())
    return url


def test_the_cache_answers_what_was_read_before(stored, machine, monkeypatch):
    folder = mirror_of(stored, machine / "kept", 10**6) / "states.zarr"
    want = Store.open(folder).read("train", 2, range(10))
    asked: list[str] = []
    real: Any = BucketStorage.client.fget
    monkeypatch.setattr(
        BucketStorage, "client", property(lambda self: (asked.append("request"), real(self))[1])
    )
    store = Store.open(folder)
    store.read("train", 3, [0])
    asked.clear()
    np.testing.assert_array_equal(store.read("train", 2, range(4)), want[:4])
    assert asked == []
    for file in (machine / "kept/ranges").glob("??/*"):  # a damaged one is read again
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    np.testing.assert_array_equal(Store.open(folder).read("train", 2, range(10)), want)


def test_the_cache_never_holds_more_than_it_may(machine):
    cache = RangeCache(machine / "kept", 10_000)
    for number in range(200):
        cache.put(str(number), bytes([number]) * (100 + number))
        assert sum(file.stat().st_size for file in (machine / "kept").glob("??/*")) <= 10_000
    assert cache.get("0") is None
    assert bytes(cache.get("199") or b"") == bytes([199]) * 299
    cache.put("large", b"x" * 10_001)
    assert cache.get("large") is None
    (machine / "kept").chmod(0o500)
    RangeCache(machine / "kept/x/y", 10**6).put("unwritable", b"1")
    (machine / "kept").chmod(0o700)


def test_a_store_on_the_hub_is_read_and_never_written(machine, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    write(machine / "there", make_spec())
    hub = MemoryFileSystem()
    for name, data in files(machine / "there").items():
        hub.pipe(f"/datasets/org/name/states.zarr/{name}", data)
    monkeypatch.setattr(HubStorage, "files", hub)
    path = Path("hf://datasets/org/name/states.zarr")
    store = Store.open(path)
    want = Store.open(machine / "there").read("train", 2, range(10))
    np.testing.assert_array_equal(store.read("train", 2, range(10)), want)
    assert mirror.run(verify.verify, VerifySettings(target=path))["ok"]
    with pytest.raises(StoreError, match=r"a place that can be written"):
        write(path, make_spec(sequences={"train": 20, "validation": 3}))
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(Path("hf://datasets/org/name/other.zarr"))


def test_urls_are_known_as_options_have_them():
    assert url_of(Path("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert url_of("hf://datasets/o/n") == "hf://datasets/o/n"
    assert url_of(Path("data/pythia-tiny")) is None
    assert not storage_of(Path("data/states.zarr")).remote


def test_without_obstore_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r'pip install "lftpipe\[objects\]"'):
        Store.open(Path("s3://bucket/states.zarr"))
