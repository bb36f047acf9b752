"""Every command that writes, killed at its disk operations and run again: as if it had never been killed."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from crash_commands import COMMANDS, TIMES, Command, content, make_world
from matplotlib.figure import Figure
from waiting import Child

from lftpipe.base.errors import LftpipeError
from lftpipe.base.outputs import MARK

OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


@pytest.fixture(autouse=True)
def pictures(monkeypatch) -> None:
    """Drawn in no time."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(MARK))


@pytest.fixture(scope="module")
def world(stores, teachers, tmp_path_factory) -> Path:
    """A workspace with a store, its map, a run and its table."""
    here = tmp_path_factory.mktemp("world") / "neox"
    make_world(here, stores["neox"], teachers["neox"])
    return here


def killed_before(number: int, command: Command, here: Path, force: bool) -> bool:
    """Whether the command, in a process of its own, came to the operation of this number and was killed.

    Operations are those of `OPERATIONS`, and to open a file of the workspace to write into it.
    """
    count = itertools.count(1)

    def passed() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(operation):
        def call(*arguments, **options):
            passed()
            return operation(*arguments, **options)

        return call

    def opened(event: str, arguments: Any) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and str(arguments[0]).startswith(str(here)):
            passed()

    def act() -> None:
        for name in OPERATIONS:
            setattr(os, name, watched(getattr(os, name)))
        sys.addaudithook(opened)
        command.run(here, force)

    status = Child(act).join()
    assert status in (0, -signal.SIGKILL), f"operation {number}: {status}"
    return status != 0


def prepare(here: Path, command: Command) -> None:
    shutil.rmtree(here / "made", ignore_errors=True)
    (here / "made").mkdir()
    command.begin(here)


def check(name: str, world: Path, tmp_path: Path, numbers, *, force: bool) -> int:
    """Kill and run again at each of the numbers until the command is not killed; how many kills."""
    command, here = COMMANDS[name], tmp_path / "neox"
    shutil.copytree(world, here)
    prepare(here, command)
    command.run(here, False)
    want, kills, before = content(here / "made"), 0, {}
    first = tmp_path / "first"
    shutil.copytree(here / "made", first)
    for number in numbers:
        prepare(here, command)
        if force:  # over what is there already
            shutil.copytree(first, here / "made", dirs_exist_ok=True)
        if not killed_before(number, command, here, force):
            break
        kills += 1
        if (left := content(here)) == before:
            continue  # nothing was written since the operation before: the same command would do the same
        before = left
        try:
            command.run(here, force)
        except LftpipeError as error:
            assert "exist" in str(error) or "there already" in str(error)  # noqa: PT017
        found = content(here / "made")
        leftover = {each for each in found if each.startswith(".")}
        assert {each: found[each] for each in found.keys() - leftover} == want, f"operation {number}"
        assert content(here).keys() - {f"made/{each}" for each in found} == content(world).keys() | {"made"}
    return kills


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_some_disk_operations(name, world, tmp_path):
    assert check(name, world, tmp_path, (1, 4, 8), force=False) > 1


@pytest.mark.long
@pytest.mark.parametrize("force", [False, True], ids=["new", "over the old"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_disk_operation(name, force, world, tmp_path):
    kills = check(name, world, tmp_path, itertools.count(1), force=force)
    print(f"| {name}{' --force' if force else ''} | {kills} |")
    assert kills > 5 or name == "generate --keep"


def test_what_differs_each_time_is_left_out_of_the_comparison(world):
    rows = json.loads((world / "results.json").read_text())["rows"]
    assert all(row["ms_per_token"] for row in rows)
    assert TIMES.sub(rb"\1", b'"ms_per_token": 0.5, "digest": "ab1"') == b'"ms_per_token": , "digest": '
