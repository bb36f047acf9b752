"""Training and extraction killed at random moments, with and without a codec: nothing is lost or changed.

`LFTPIPE_KILLS` is how many moments; `make crash` takes 100.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONTEXT, extracted
from disk_faults import killed_after
from fake_states import files
from training_runs import assert_same_weights, change, log_of, short_run

from lftpipe import runs
from lftpipe.commands.train import train
from lftpipe.store import verify_store

KILLS = int(os.environ.get("LFTPIPE_KILLS", "3"))


@pytest.fixture(scope="module", params=["none", "blosc"])
def compress(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def store(compress, teachers, text_folder, tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp(f"store-{compress}")
    return extracted(workspace, teachers["neox"], text_folder, compress=compress)


def timed(act: Callable[[], Any]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def killed_at(
    number: int, seconds: float, rng: np.random.Generator, act: Callable[[], Any], left: Path
) -> bool:
    """Killed at a random moment; the first time as soon as there is something to go on from."""
    if number == 0:
        return killed_after(0, act, left.exists)
    return killed_after(seconds * rng.uniform(0.02, 1), act)


def rows_of(run: Any) -> list[dict[str, Any]]:
    """Of its metrics, all but what a clock says."""
    return [{key: row[key] for key in row if "seconds" not in key} for row in log_of(run)]


def test_training_killed_at_random_moments_ends_with_the_same_weights(store, compress, tmp_path):
    whole = short_run(store, tmp_path / "whole", tokens=24 * 4 * CONTEXT, checkpoint_every=2, ema=0.9)
    train(whole)
    shutil.rmtree(str(whole.run))
    seconds = timed(lambda: train(whole))
    rng, killed, went_on = np.random.default_rng(0), 0, 0
    for number in range(KILLS):
        broken = change(whole, run=str(tmp_path / "broken"), seed=number % 2, resume=True)
        want = change(whole, run=str(tmp_path / f"whole-{number % 2}"), seed=number % 2)
        if not Path(str(want.run)).exists():
            train(want)
        checkpoint = Path(str(broken.run)) / runs.CHECKPOINT
        killed += killed_at(number, seconds, rng, lambda broken=broken: train(broken), checkpoint)
        went_on += checkpoint.exists()
        train(broken)
        assert_same_weights(str(broken.run), str(want.run))
        assert rows_of(broken.run) == rows_of(want.run)
        assert {path.name for path in Path(str(broken.run)).iterdir()} == {
            path.name for path in Path(str(want.run)).iterdir()
        }
        shutil.rmtree(str(broken.run))
    print(f"| training, --compress {compress} | {killed} | {went_on} |")
    assert killed >= KILLS // 3
    assert went_on


@pytest.mark.slow
def test_extraction_killed_at_random_moments_gives_the_same_store(
    store, compress, teachers, text_folder, tmp_path
):
    def extract() -> None:
        extracted(tmp_path, teachers["neox"], text_folder, store=tmp_path / "broken.zarr", compress=compress)

    seconds = timed(extract)
    assert files(tmp_path / "broken.zarr") == files(store)
    rng, killed, went_on = np.random.default_rng(1), 0, 0
    journal = tmp_path / "broken.zarr" / "journal.jsonl"
    for number in range(KILLS):
        shutil.rmtree(tmp_path / "broken.zarr")
        killed += killed_at(number, seconds, rng, extract, journal)
        went_on += journal.exists()
        extract()
        assert files(tmp_path / "broken.zarr") == files(store)
    assert verify_store(tmp_path / "broken.zarr").ok
    print(f"| extraction, --compress {compress} | {killed} | {went_on} |")
    assert killed >= KILLS // 3
    assert went_on
