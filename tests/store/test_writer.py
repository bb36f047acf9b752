"""What the writer refuses, keeps and does again."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_states import environment, files, fill, make_spec, states, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.store import StoreWriter
from lftpipe.store.shard import _pages


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "states.zarr"


def test_an_error_within_a_shard_leaves_nothing_behind(path):
    spec = make_spec()
    with StoreWriter.open(path, spec) as writer:
        key = writer.pending()[0]
        with pytest.raises(RuntimeError, match="teacher fell over"), writer.shard(key) as shard:  # noqa: PT012
            shard.put("hidden", 0, 0, states(spec, "train", "hidden", 0, range(3)))
            raise RuntimeError("teacher fell over")
        assert writer.pending()[0] == key
        assert not list(path.rglob("*.partial"))
        assert not list(path.rglob("c.*"))


def test_a_shard_must_be_whole(path):
    spec = make_spec()
    with StoreWriter.open(path, spec) as writer:
        key = writer.pending()[0]
        message = "attention layer 3 of train sequence 2 was never put"
        with pytest.raises(ValueError, match=message), writer.shard(key) as shard:  # noqa: PT012
            for array, layer in (("hidden", 0), ("hidden", 2), ("hidden", 3), ("attention", 2)):
                shard.put(array, layer, 0, states(spec, "train", array, layer, range(4)))
            shard.put("attention", 3, 0, states(spec, "train", "attention", 3, range(2)))
        with pytest.raises(ValueError, match="put twice"), writer.shard(key) as shard:  # noqa: PT012
            for _ in range(2):
                shard.put("hidden", 0, 0, states(spec, "train", "hidden", 0, range(4)))
        with (
            pytest.raises(ValueError, match="3 sequences at 2 do not fit a shard of 4"),
            writer.shard(key) as shard,
        ):
            shard.put("hidden", 0, 2, states(spec, "train", "hidden", 0, range(3)))
        with pytest.raises(StoreError, match=r"4 shards of .* are not written"):
            writer.finish()


@pytest.mark.parametrize("gathered", [1, 3000, 2**20])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_slots_taken_ahead_give_the_same_store(path, tmp_path, monkeypatch, dtype, gathered):
    spec = make_spec(dtype=dtype, context=37)
    write(tmp_path / "put", spec)
    monkeypatch.setattr("lftpipe.store.shard._GATHERED", gathered)
    with StoreWriter.open(path, spec) as writer:
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        for key in writer.pending():
            with writer.shard(key) as shard:
                slots = []
                for first in range(0, len(key.sequences), 3):
                    for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
                        for layer in layers:
                            block = states(spec, key.split, array, layer, key.sequences[first : first + 3])
                            slots.append(shard.slot(array, layer, first, len(block)))
                            slots[-1].values[:] = block
                for slot in slots:
                    shard.write(slot)
        writer.finish()
    assert files(path) == files(tmp_path / "put")


def test_tokens_must_not_be_forgotten(path):
    spec = make_spec()
    with StoreWriter.open(path, spec) as writer:
        for key in writer.pending():
            with writer.shard(key) as shard:
                fill(shard, spec)
        with pytest.raises(ValueError, match="tokens of train shard 0 was never put"):
            writer.finish()


@pytest.mark.parametrize("given", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_stop_the_run(path, dtype, value, given):
    spec = make_spec(dtype=dtype)
    with StoreWriter.open(path, spec) as writer:
        key = writer.pending()[1]
        block = states(spec, "train", "hidden", 2, key.sequences).astype(given)
        block[1, 5, 39] = value
        message = f"{value:g} in hidden layer 2, train sequence 5, position 5, channel 39"
        with pytest.raises(StoreError, match=message), writer.shard(key) as shard:
            shard.put("hidden", 2, 0, block)


def test_values_too_large_for_float16_stop_the_run(path):
    for value, fits in ((65504.0, True), (65519.0, True), (65520.0, False), (-7e4, False)):
        spec = make_spec()
        block = np.zeros((1, 6, 40), np.float32)
        block[0, 0, 7] = value
        with StoreWriter.open(path, spec) as writer:
            key = writer.pending()[0]
            if fits:
                with pytest.raises(ValueError, match="never put"), writer.shard(key) as shard:
                    shard.put("hidden", 3, 0, block)
            else:
                message = r"-?inf in hidden layer 3, .* channel 7 / expected: finite values within 65504"
                with pytest.raises(StoreError, match=message), writer.shard(key) as shard:
                    shard.put("hidden", 3, 0, block)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_never_touched(path, force):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"holds thesis.tex and no store"):
        StoreWriter.open(path, make_spec(), force=force)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_a_second_writer_is_refused_also_in_another_process(path):
    with StoreWriter.open(path, make_spec()):
        with pytest.raises(StoreError, match="is being written by another process"):
            StoreWriter.open(path, make_spec())
        command = [sys.executable, str(Path(__file__).parents[1] / "fake_states.py"), str(path), "10", "3"]
        other = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False, timeout=120
        )
        assert other.returncode == 1
        assert "is being written by another process" in other.stderr
    write(path, make_spec())


def test_the_lock_is_the_kernels(path):
    take = fcntl.LOCK_EX | fcntl.LOCK_NB
    unavailable = pytest.raises(BlockingIOError, match="temporarily unavailable")
    with StoreWriter.open(path, make_spec()), (path / "writer.lock").open() as lock, unavailable:
        fcntl.flock(lock, take)
    with (path / "writer.lock").open() as lock:
        assert fcntl.flock(lock, take) is None  # free with its owner, though the file stays


def test_a_writer_leaves_no_file_open(path):
    def opened() -> set[str]:
        return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}

    write(path, make_spec())
    write(path, make_spec(sequences={"train": 13, "validation": 3}))
    assert not [name for name in opened() if name.startswith(str(path))]


def test_two_slots_of_half_the_memory_are_written_at_once(path, monkeypatch):
    """Each chunk of 4 MiB has a checksum too; a write of each alone would be half as large."""
    spec = make_spec(context=2**11, width=2**10, sequences={"train": 4}, attention_layers=())
    written: list[int] = []
    real = os.write
    with StoreWriter.open(path, spec) as writer:
        block = np.ones((1, spec.context, spec.width), np.float16)
        monkeypatch.setattr(os, "write", lambda fd, data: (written.append(len(data)), real(fd, data))[1])
        with writer.shard(writer.pending()[0]) as shard:
            for layer in spec.layers:
                for first in range(4):
                    shard.put("hidden", layer, first, block)
    large = [size for size in written if size > 2**20]
    assert len(large) <= 7  # twelve chunks
    assert max(large) > 8 * 2**20 - 4096


def test_memory_is_taken_from_one_list_by_several_threads():
    free: list[np.ndarray] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(300):
                free.append(_pages(100, free))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "waited 30 s for threads that free pages"
    assert errors == []
