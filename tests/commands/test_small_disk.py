"""A disk that runs full under each command that writes: one line within seconds, and nothing lost."""

import gc
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash_commands import COMMANDS, Command, content, make_world
from disk_faults import small_disk

from lftpipe.base.errors import LftpipeError
from lftpipe.cli.guard import line_of

#: Parts of the room that a command needs.
PARTS = (0.05, 0.25, 0.5, 0.75, 0.95)

#: A disk with room to spare, also for the 256 MiB that an extraction leaves free.
ROOMY = "400m"

#: After so many an answer counts as none; long, since the machine may be busy. What it took is printed.
SECONDS = 600

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def world(stores, teachers, tmp_path_factory) -> Path:
    here = tmp_path_factory.mktemp("world") / "neox"
    make_world(here, stores["neox"], teachers["neox"])
    return here


@contextmanager
def disk(made: Path, size: str) -> Iterator[None]:
    """A file system of a size in the place of a folder."""
    shutil.rmtree(made, ignore_errors=True)
    if not small_disk(made, size):
        pytest.skip("only root may mount a small tmpfs")
    try:
        yield
    finally:
        gc.collect()  # readers of a store that was written here hold its files open
        subprocess.run(["umount", str(made)], check=True)


def resize(made: Path, size: int | str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(made)], check=True)


def used(made: Path) -> int:
    status = os.statvfs(made)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def answer(command: Command, here: Path) -> tuple[str, float]:
    """What the command says in the end, nothing if it succeeds, and after how many seconds."""
    receive, send = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what ends a test that takes too long
        signal.alarm(SECONDS)
        # The room asked for beforehand would refuse such a disk; here it is to run full.
        shutil.disk_usage = lambda _: Usage(1 << 40, 0, 1 << 40)  # pyright: ignore
        try:
            command.run(here, False)
        except Exception as error:
            os.write(send, line_of(error).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        line = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"it died of signal {status}"
    return line, time.monotonic() - started


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_runs_full_costs_nothing_but_room(name, world, tmp_path):
    command, here = COMMANDS[name], tmp_path / "neox"
    shutil.copytree(world, here)
    with disk(here / "made", ROOMY):
        command.begin(here)
        before = used(here / "made")
        command.run(here, False)
        want, needed = content(here / "made"), used(here / "made") - before
    full, longest = 0, 0.0
    for part in PARTS:
        with disk(here / "made", ROOMY):
            command.begin(here)
            resize(here / "made", before + max(4096, int(part * needed)))
            line, seconds = answer(command, here)
            if line:
                full, longest = full + 1, max(longest, seconds)
                assert line.startswith("given: ")
                assert "No space left on device" in line
                assert "\n" not in line
                assert "defect" not in line
                assert " / do: " in line
                assert "--force" not in line.rpartition(" / do: ")[2]
            resize(here / "made", ROOMY)
            refusal = ""
            try:
                command.run(here, False)
            except LftpipeError as error:
                refusal = str(error)
            assert not refusal or "exist" in refusal
            assert not (refusal and line)
            found = content(here / "made")
            assert {each: found[each] for each in found if not each.startswith(".")} == want, (
                f"{part}, {line}"
            )
            assert content(here).keys() - {f"made/{each}" for each in found} == content(world).keys() | {
                "made"
            }
    print(f"| {name} | {len(PARTS)} | {full} | {longest:.1f} |")
    assert full or needed <= 2 * 4096  # a page or two fit on any disk
