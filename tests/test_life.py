"""docs/life.md tells the truth: the files that a training step and a shard pass are those that it lists."""

import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from extractions import change, small_extraction
from training_runs import short_run

from lftpipe.commands import extract as extract_command
from lftpipe.commands.extract import extract
from lftpipe.commands.train import train
from lftpipe.extraction.shard_job import Producer
from lftpipe.training.loop import Learner

ROOT = Path(__file__).parents[1]


def listed(begin: str, end: str) -> set[str]:
    """The files in the first column of a part of the page."""
    part = (ROOT / "docs/life.md").read_text().split(begin)[1].split(end)[0]
    return set(re.findall(r"^\| `(lftpipe/[\w/]+\.py)` \|", part, re.M))


class Watch:
    """Which files of lftpipe are entered, by the name of the thread, while it is on."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = defaultdict(set)
        self.on = False

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        if self.on and event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "lftpipe"):
                self.files[threading.current_thread().name].add(path.relative_to(ROOT).as_posix())


@contextmanager
def watched() -> Iterator[Watch]:
    watch, before = Watch(), sys.getprofile()
    sys.setprofile(watch)
    threading.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def test_a_training_step_passes_the_files_that_its_page_lists(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.advance
    with watched() as watch:

        def advance(self: Learner, *arguments: Any) -> None:
            real(self, *arguments)
            watch.on = self.run.step in (2, 3)  # two whole steps, and what is read ahead meanwhile

        monkeypatch.setattr(Learner, "advance", advance)
        train(short_run(stores["neox"], tmp_path, objective="fw", log_every=100, checkpoint_every=100))
    ahead = watch.files.pop("lftpipe-batches")
    (step,) = watch.files.values()
    page = listed("## A training step", "Beside it a thread"), listed("Beside it a thread", "int8 and")
    others = sorted(step ^ page[0]), sorted(ahead ^ page[1])
    assert others == ([], []), others


def test_a_shard_passes_the_files_that_its_page_lists(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_extraction(tmp_path, teachers["neox"], text_folder)
    settings = change(settings, shard_bytes=1, batch_tokens=2 * CONTEXT, threads=2)  # a shard is a batch
    compute, run = extract_command.compute, Producer.run
    with watched() as watch:

        def computed(*arguments: Any) -> int:
            watch.on = True
            try:
                return compute(*arguments)
            finally:
                watch.on = False

        def loaded_first(self: Producer, *arguments: Any) -> None:
            watch.on = False
            _ = self._passes  # loads the teacher
            watch.on = True
            run(self, *arguments)

        monkeypatch.setattr(extract_command, "compute", computed)
        monkeypatch.setattr(Producer, "run", loaded_first)
        extract(settings)
    seen, page = set().union(*watch.files.values()), listed("## A shard", "When the last shard")
    others = sorted(seen - page), sorted(page - seen)
    assert others == ([], []), others
