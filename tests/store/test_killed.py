"""Whatever ends a writer, and whenever: what is resumed equals, file for file, what was never broken."""

import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import fake_states
import numpy as np
import pytest
from disk_faults import before_operation, counted, disk_full, small_disk
from fake_states import files, make_spec, write

from lftpipe.base.errors import StoreError
from lftpipe.store import Store, StoreWriter, verify_store

SPEC = make_spec(sequences={"train": 6, "validation": 3})
GROWN = make_spec(sequences={"train": 9, "validation": 3})


@pytest.fixture(scope="module")
def processes():
    """Processes begin as copies of one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fake_states", "disk_faults", "zarr.storage", "lftpipe.store.zarr_codec", __name__]
    )
    return context


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    write(folder / "new", SPEC)
    shutil.copytree(folder / "new", folder / "grown")
    write(folder / "grown", GROWN)
    return folder


def die(name, arguments) -> None:
    """As kill -9 in the middle of a write does."""
    if name == "write":
        descriptor, data = arguments
        half = len(data) // 2
        if len(data) % mmap.PAGESIZE == 0:  # it may bypass the page cache, which takes whole pages only
            half -= half % mmap.PAGESIZE
        os.pwrite(descriptor, data[:half], os.lseek(descriptor, 0, os.SEEK_CUR))
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(path: Path, spec, number: int, count=None, repair=False) -> None:
    counted = before_operation(number, die)
    write(path, spec, repair=verify_store(path) if repair else None)
    if count:
        count.put(counted[0])


def run(processes, *arguments) -> int:
    process = processes.Process(target=write_and_die, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def operations(processes, tmp_path: Path, spec, start: Path | None = None) -> int:
    count = processes.SimpleQueue()
    if start:
        shutil.copytree(start, tmp_path / "counted")
    assert run(processes, tmp_path / "counted", spec, 0, count) == 0
    return count.get()


def differing(processes, tmp_path, numbers, spec, want: Path, start: Path | None = None) -> list[int]:
    """The disk operations at which a kill cost something: the store is then another one, or unreadable."""
    wrong = []
    for number in numbers:
        path = tmp_path / f"killed-{number}"
        if start:
            shutil.copytree(start, path)
        right = run(processes, path, spec, number) == -signal.SIGKILL
        if start:  # a store that grows is readable all along
            right &= Store.open(path).num_sequences("train") in (6, 9)
            right &= not [damage for damage in verify_store(path).damaged if "/c." in damage.file]
        write(path, spec)
        if not (right and files(path) == files(want) and verify_store(path).ok):
            wrong.append(number)
        shutil.rmtree(path)
    return wrong


def test_kill_9_at_random_disk_operations(processes, tmp_path, unbroken):
    total = operations(processes, tmp_path, SPEC)
    assert total > 100
    numbers = np.random.default_rng(0).choice(total, 3, replace=False) + 1
    assert differing(processes, tmp_path, numbers, SPEC, unbroken / "new") == []


def test_kill_9_at_random_disk_operations_of_a_growing_store(processes, tmp_path, unbroken):
    before, after = unbroken / "new", unbroken / "grown"
    total = operations(processes, tmp_path, GROWN, before)
    numbers = np.random.default_rng(1).choice(total, 3, replace=False) + 1
    assert differing(processes, tmp_path, numbers, GROWN, after, before) == []


@pytest.mark.long
def test_kill_9_at_every_disk_operation(processes, tmp_path, unbroken):
    numbers = range(1, operations(processes, tmp_path, SPEC) + 1)
    assert differing(processes, tmp_path, numbers, SPEC, unbroken / "new") == []


@pytest.mark.long
def test_kill_9_at_every_disk_operation_of_a_growing_store(processes, tmp_path, unbroken):
    before, after = unbroken / "new", unbroken / "grown"
    numbers = range(1, operations(processes, tmp_path, GROWN, before) + 1)
    assert differing(processes, tmp_path, numbers, GROWN, after, before) == []


def test_kill_9_again_and_again(processes, tmp_path, unbroken):
    rng, kills = np.random.default_rng(2), 0
    while (code := run(processes, tmp_path / "killed", SPEC, int(rng.integers(10, 70)))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert files(tmp_path / "killed") == files(unbroken / "new")


def test_kill_9_in_a_repair(processes, tmp_path, unbroken):
    for number in (4, 20, 30):
        path = tmp_path / f"repaired-{number}"
        shutil.copytree(unbroken / "new", path)
        (path / "train/hidden/c.0.1.0.0").write_bytes(b"")
        (path / "manifest.json").unlink()
        assert run(processes, path, SPEC, number, None, True) == -signal.SIGKILL
        try:
            write(path, SPEC)
        except StoreError:
            write(path, SPEC, repair=verify_store(path))
        assert files(path) == files(unbroken / "new")
        assert verify_store(path).ok


@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.long)])
def test_kill_9_at_random_moments(processes, tmp_path, unbroken, moments):
    rng = np.random.default_rng(3)
    start = time.monotonic()
    assert run(processes, tmp_path / "timed", SPEC, 0) == 0
    duration, killed = time.monotonic() - start, 0
    for moment in range(moments):
        process = processes.Process(target=write_and_die, args=(tmp_path / f"{moment}", SPEC, 0))
        process.start()
        time.sleep(duration * rng.uniform(0.1, 1))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        write(tmp_path / f"{moment}", SPEC)
        assert files(tmp_path / f"{moment}") == files(unbroken / "new")
    assert killed >= moments // 3


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, unbroken):
    """ENOSPC from the n-th disk operation, for some n; then there is room again."""
    for number in (1, 30, 75, 110):
        with (
            counted(number, disk_full),
            pytest.raises(StoreError, match=r"No space left on device .* free some space"),
        ):
            write(tmp_path / f"{number}", SPEC)
        write(tmp_path / f"{number}", SPEC)
        assert files(tmp_path / f"{number}") == files(unbroken / "new")


def limited(path: Path, results) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        write(path, SPEC)
    except StoreError as error:
        results.put(str(error))


def test_a_limit_on_file_sizes_is_a_full_disk(processes, tmp_path, unbroken):
    """A write is cut short by the kernel, the next one refused."""
    results = processes.SimpleQueue()
    process = processes.Process(target=limited, args=(tmp_path / "limited", results))
    process.start()
    assert "File too large" in results.get()
    process.join()
    write(tmp_path / "limited", SPEC)
    assert files(tmp_path / "limited") == files(unbroken / "new")


def test_a_small_disk_runs_full(tmp_path, unbroken):
    if not small_disk(tmp_path / "disk", "100k"):
        pytest.skip("only root may mount a small tmpfs")
    try:
        with pytest.raises(StoreError, match="No space left on device"):
            write(tmp_path / "disk/states.zarr", SPEC)
        with pytest.raises(StoreError, match=r"store holds \d of 3 shards"):
            Store.open(tmp_path / "disk/states.zarr")
        subprocess.run(["mount", "-o", "remount,size=10m", str(tmp_path / "disk")], check=True)
        write(tmp_path / "disk/states.zarr", SPEC)
        assert files(tmp_path / "disk/states.zarr") == files(unbroken / "new")
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def as_nobody(path: Path, results) -> None:
    os.setuid(65534)
    for name in ("states.zarr", "new.zarr"):
        try:
            StoreWriter.open(path / name, fake_states.make_spec())
        except StoreError as error:
            results.put(str(error))
    results.put(
        (Store.open(path / "states.zarr").num_sequences("train"), verify_store(path / "states.zarr").ok)
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_cannot_be_written_is_refused_and_can_be_read(processes, tmp_path):
    write(tmp_path / "states.zarr", make_spec())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.parent == folder or folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    results = processes.SimpleQueue()
    process = processes.Process(target=as_nobody, args=(tmp_path, results))
    process.start()
    process.join(60)
    assert process.exitcode == 0, "the other user's process did not end well"
    for _ in range(2):
        assert "Permission denied / expected: a folder that can be written" in results.get()
    assert results.get() == (10, True)
