"""Every command that writes, killed at its disk operations and run again: as if it had never been killed."""

import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from training_runs import short_run

from lftpipe.config.settings import (
    EvaluateSettings,
    ExportSettings,
    RecoupleSettings,
    ReportSettings,
    SweepSettings,
    ToySettings,
)
from lftpipe.errors import LftpipeError
from lftpipe.stages.evaluate import evaluate
from lftpipe.stages.export import export
from lftpipe.stages.recouple import recouple
from lftpipe.stages.report import report
from lftpipe.stages.sweep import sweep
from lftpipe.stages.toy import toy
from lftpipe.stages.train import train

OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")

#: What differs from one unkilled command to the next: times, and digests over them.
TIMES = re.compile(rb'("(ms_per_token|seconds|\w*_seconds|digest|metrics_digest)": )("\w*"|[\d.e+-]+)')

Command = Callable[[Path, bool], Any]


@pytest.fixture(scope="module")
def world(stores, tmp_path_factory) -> Path:
    """A workspace with a store, its map, a run and its table."""
    here = tmp_path_factory.mktemp("world") / "neox"
    shutil.copytree(stores["neox"], here / "states.zarr")
    train(run_settings(here / "states.zarr", here / "runs"))
    recouple(RecoupleSettings(store=here / "states.zarr", tokens=32, batches=2))
    evaluate(EvaluateSettings(store=here / "states.zarr", k=(1,), skips=(1,)))
    return here


def run_settings(store: Path, folder: Path, **changes: Any):
    given = {"tokens": 6 * 4 * CONTEXT, "checkpoint_every": 2, "objective": "regression"}
    return short_run(store, folder, **given | changes)


def recoupled(here: Path, force: bool) -> None:
    out = here / "made" / "map.json"
    recouple(RecoupleSettings(store=here / "states.zarr", tokens=16, batches=2, out=out, force=force))


def evaluated(here: Path, force: bool) -> None:
    out = here / "made" / "table.json"
    evaluate(EvaluateSettings(store=here / "states.zarr", k=(1,), skips=(1,), out=out, force=force))


def reported(here: Path, force: bool) -> None:
    report(ReportSettings(store=here / "states.zarr", out=here / "made" / "page.md", force=force))


def toyed(here: Path, force: bool) -> None:
    toy(ToySettings(out=here / "made" / "toy.json", steps=2, batch=8, steps_at_inference=2, force=force))


def exported(here: Path, force: bool) -> None:
    out = here / "made" / "export"
    export(ExportSettings(workspace=here.parent, runs=(str(here / "runs/run"),), out=out, force=force))


def trained(here: Path, force: bool) -> None:
    train(run_settings(here / "states.zarr", here / "made", resume=not force, force=force))


def swept(here: Path, force: bool) -> None:
    sweep(
        SweepSettings(
            store=here / "states.zarr",
            lengths=(2,),
            tokens=2 * 4 * CONTEXT,
            batch_tokens=4 * CONTEXT,
            compute_dtype="float32",
            probe_tokens=64,
            out=here / "made" / "sweep.json",
            force=force,
        )
    )


COMMANDS: dict[str, Command] = {
    "recouple": recoupled,
    "evaluate": evaluated,
    "report": reported,
    "toy": toyed,
    "export": exported,
    "train": trained,
    "sweep": swept,
}


def killed_before(number: int, command: Command, here: Path, force: bool) -> bool:
    """Whether the command, in a process of its own, came to the operation of this number and was killed."""
    child = os.fork()
    if child == 0:
        try:
            count = itertools.count(1)

            def watched(operation):
                def call(*arguments, **options):
                    if next(count) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return operation(*arguments, **options)

                return call

            for name in OPERATIONS:
                setattr(os, name, watched(getattr(os, name)))
            command(here, force)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"operation {number}: {status}"
    return status == signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, without what differs each time; of pages their words alone."""
    found = {}
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix in (".json", ".jsonl"):
            data = TIMES.sub(rb"\1", data)
        elif path.suffix == ".md":
            data = re.sub(rb"[\d.e-]+", b"", data)
        elif path.suffix == ".toml":
            data = re.sub(rb"(resume|force) = \w+", b"", data)
        found[str(path.relative_to(folder))] = data
    return found


def check(name: str, world: Path, tmp_path: Path, numbers, *, force: bool) -> int:
    """Kill and run again at each of the numbers until the command is not killed; how many kills."""
    command, here = COMMANDS[name], tmp_path / "neox"
    shutil.copytree(world, here)
    command(here, False)
    want, kills = content(here / "made"), 0
    first = tmp_path / "first"
    shutil.copytree(here / "made", first)
    for number in numbers:
        shutil.rmtree(here / "made")
        if force:  # over what is there already
            shutil.copytree(first, here / "made")
        if not killed_before(number, command, here, force):
            break
        kills += 1
        try:
            command(here, force)
        except LftpipeError as error:
            assert "exist" in str(error) or "there already" in str(error)  # noqa: PT017
        found = content(here / "made")
        leftover = {each for each in found if each.startswith(".")}
        assert {each: found[each] for each in found.keys() - leftover} == want, f"operation {number}"
        assert content(here).keys() - {f"made/{each}" for each in found} == content(world).keys() | {"made"}
    return kills


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_some_disk_operations(name, world, tmp_path):
    assert check(name, world, tmp_path, (1, 3, 6, 9), force=False) == 4


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["new", "over the old"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_disk_operation(name, force, world, tmp_path):
    kills = check(name, world, tmp_path, itertools.count(1), force=force)
    print(f"{name}{' --force' if force else ''}: killed at {kills} disk operations")
    assert kills > 5


def test_what_differs_each_time_is_left_out_of_the_comparison(world):
    rows = json.loads((world / "results.json").read_text())["rows"]
    assert all(row["ms_per_token"] for row in rows)
    assert TIMES.sub(rb"\1", b'"ms_per_token": 0.5, "digest": "ab1"') == b'"ms_per_token": , "digest": '
