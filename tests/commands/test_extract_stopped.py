"""An extraction that is killed, interrupted or out of disk loses nothing and is the same when it goes on."""

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from extractions import change, contents, small_extraction
from waiting import Child, wait_until

from lftpipe.base.errors import StoreError
from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings
from lftpipe.store import ShardWriter, Store, verify_store


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return small_extraction(tmp_path, teachers["neox"], text_folder)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_never_killed(settings, tmp_path, monkeypatch, compute_dtype):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    settings = change(settings, tokens=60 * CONTEXT, compute_dtype=compute_dtype, logits=3)
    whole = contents(Path(extract(change(settings, workspace=tmp_path / "whole"))["store"]))
    assert sum("hidden/c." in name for name in whole) > 10
    killed = change(settings, workspace=tmp_path / "killed")
    store = tmp_path / "killed" / "neox" / "states.zarr"
    rng = random.Random(0)
    kills = 0
    for enough in (1, 3):  # kill it twice, after that many shards
        child = Child(lambda: extract(killed))
        wait_until(
            lambda child=child, enough=enough: (
                not child.running or len(list(store.glob("train/hidden/c.*"))) >= enough
            ),
            f"{enough} shards",
            every=0.001,
        )
        time.sleep(rng.uniform(0, 0.01))
        kills += child.kill(signal.SIGKILL) == -signal.SIGKILL
    if kills:
        with pytest.raises(StoreError, match="--resume"):
            Store.open(store)
    extract(killed)
    assert contents(store) == whole


def test_an_interrupt_loses_nothing(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    from lftpipe.teacher.trunk import Trunk

    run, calls = Trunk.run, []

    def interrupted(self: Trunk, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        run(self, *arguments, **options)

    monkeypatch.setattr(Trunk, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(settings)
    done = len(list(settings.workspace.glob("*/states.zarr/*/hidden/c.*")))
    assert done > 0
    assert not list(settings.workspace.rglob("*.partial"))
    assert extract(settings)["tokens"]["train"] == 40 * CONTEXT
    assert len(calls) < 6 + 12  # what was done before was not done again


@pytest.mark.parametrize("nth", [2, 5, 9])
def test_a_disk_that_fills_up_while_a_shard_is_committed_stops_the_run(settings, monkeypatch, nth):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    seal, calls = ShardWriter.seal, []

    def full(self: ShardWriter) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return seal(self)

    monkeypatch.setattr(ShardWriter, "seal", full)
    with pytest.raises(StoreError, match="room for the whole store"):
        extract(settings)
    assert not list(settings.workspace.rglob("*.partial"))
    path = Path(extract(settings)["store"])
    assert verify_store(path).ok
    assert contents(path) == contents(
        Path(extract(change(settings, store=path.parent / "whole.zarr"))["store"])
    )
