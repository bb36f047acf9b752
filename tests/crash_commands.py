"""Every command that writes, small enough to be killed a hundred times, and the workspace it works in.

Each writes into `made` beside the store.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import CONTEXT, extracted, text_of
from training_runs import short_run

from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.generate import generate
from lftpipe.commands.heal import heal
from lftpipe.commands.recouple import recouple
from lftpipe.commands.report import report
from lftpipe.commands.sweep import sweep
from lftpipe.commands.toy import toy
from lftpipe.commands.train import train
from lftpipe.config.settings import (
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    HealSettings,
    RecoupleSettings,
    ReportSettings,
    SweepSettings,
    ToySettings,
)

BATCH = 4 * CONTEXT

#: What differs from one unkilled command to the next: times, and digests over them.
TIMES = re.compile(rb'("(ms_per_token|seconds|\w*_seconds|digest|metrics_digest)": )("\w*"|[\d.e+-]+)')


def nothing(here: Path) -> None:
    """The command begins without anything in `made`."""


@dataclass(frozen=True)
class Command:
    """How to run a command over what is there or beside it, and what must be there before."""

    run: Callable[[Path, bool], Any]
    begin: Callable[[Path], None] = nothing


def make_world(here: Path, store: Path, teacher: Path) -> None:
    """A store, its map, a run, its table, a teacher, and another corpus."""
    shutil.copytree(store, here / "states.zarr")
    shutil.copytree(teacher, here / "teacher")
    train(run_settings(here / "states.zarr", here / "runs"))
    recouple(RecoupleSettings(store=here / "states.zarr", tokens=32, batches=2))
    evaluate(EvaluateSettings(store=here / "states.zarr", k=(1,), skips=(1,)))
    (here / "text").mkdir()
    for seed in range(30):
        (here / "text" / f"{seed:02d}.md").write_text(text_of(seed + 100, 40))


def run_settings(store: Path, folder: Path, **changes: Any):
    given = {"tokens": 6 * BATCH, "checkpoint_every": 2, "objective": "regression"}
    return short_run(store, folder, **given | changes)


def extract_it(here: Path, force: bool) -> None:
    small = {"tokens": 16 * CONTEXT, "validation_tokens": 2 * CONTEXT, "layers": "0,2"}
    store = here / "made" / "new.zarr"
    extracted(here.parent, here / "teacher", here / "text", store=store, force=force, **small)


def recouple_it(here: Path, force: bool) -> None:
    out = here / "made" / "map.json"
    recouple(RecoupleSettings(store=here / "states.zarr", tokens=16, batches=2, out=out, force=force))


def train_it(here: Path, force: bool) -> None:
    train(run_settings(here / "states.zarr", here / "made", resume=not force, force=force))


def train_jointly(here: Path, force: bool) -> None:
    """Two blocks in one checkpoint, from the states of the live teacher, with an average of the weights."""
    changes = {"block": "0:1,2:4", "joint": True, "tokens": 4 * BATCH, "ema": 0.9, "hold_back": 0.1}
    settings = run_settings(here / "states.zarr", here / "made", **changes)
    train(settings.__class__(**vars(settings) | {"resume": not force, "force": force}))


def fit(here: Path, force: bool) -> None:
    changes = {"objective": "linear", "resume": not force, "force": force}
    train(run_settings(here / "states.zarr", here / "made", **changes))


def heal_it(here: Path, force: bool) -> None:
    heal(
        HealSettings(
            store=here / "states.zarr",
            target=str(here / "runs/run"),
            run=str(here / "made" / "healed"),
            loss="tokens",
            tokens=4 * BATCH,
            batch_tokens=BATCH,
            compute_dtype="float32",
            hold_back=0.1,
            log_every=1,
            evaluate_every=2,
            checkpoint_every=2,
            resume=not force,
            force=force,
        )
    )


def evaluate_it(here: Path, force: bool) -> None:
    out = here / "made" / "table.json"
    evaluate(EvaluateSettings(store=here / "states.zarr", k=(1,), skips=(1,), out=out, force=force))


def evaluate_elsewhere(here: Path, force: bool) -> None:
    """On another corpus, whose states are stored beside the store."""
    store, out = here / "made" / "states.zarr", here / "made" / "other.json"
    runs = (str(here / "runs/run"),)
    text = str(here / "text")
    evaluate(EvaluateSettings(store=store, runs=runs, corpus=text, k=(1,), skips=(), out=out, force=force))


def store_beside(here: Path) -> None:
    shutil.copytree(here / "states.zarr", here / "made" / "states.zarr")


def report_it(here: Path, force: bool) -> None:
    report(ReportSettings(store=here / "states.zarr", out=here / "made" / "page.md", force=force))


def draw_toy(here: Path, force: bool) -> None:
    toy(ToySettings(out=here / "made" / "toy.json", steps=2, batch=8, steps_at_inference=2, force=force))


def export_it(here: Path, force: bool) -> None:
    out = here / "made" / "export"
    export(ExportSettings(workspace=here.parent, runs=(str(here / "runs/run"),), out=out, force=force))


def generate_it(here: Path, force: bool) -> None:
    target = str(here / "made" / "run")
    generate(
        GenerateSettings(
            workspace=here.parent,
            target=target,
            prompt="the state",
            max_new_tokens=2,
            keep=True,
            compare=True,
        )
    )


def run_beside(here: Path) -> None:
    shutil.copytree(here / "runs" / "run", here / "made" / "run")


def sweep_it(here: Path, force: bool) -> None:
    sweep(
        SweepSettings(
            store=here / "states.zarr",
            lengths=(2,),
            tokens=2 * BATCH,
            batch_tokens=BATCH,
            compute_dtype="float32",
            probe_tokens=64,
            out=here / "made" / "sweep.json",
            force=force,
        )
    )


COMMANDS: dict[str, Command] = {
    "extract": Command(extract_it),
    "recouple": Command(recouple_it),
    "train": Command(train_it),
    "train, joint": Command(train_jointly),
    "train, linear": Command(fit),
    "heal": Command(heal_it),
    "evaluate": Command(evaluate_it),
    "evaluate --corpus": Command(evaluate_elsewhere, store_beside),
    "report": Command(report_it),
    "toy": Command(draw_toy),
    "export": Command(export_it),
    "generate --keep": Command(generate_it, run_beside),
    "sweep": Command(sweep_it),
}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, without what differs each time; of pages their words alone."""
    found = {}
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix in (".json", ".jsonl"):
            data = TIMES.sub(rb"\1", data)
        elif path.suffix in (".md", ".html"):
            data = re.sub(rb"[\d.e-]+", b"", data)
        elif path.suffix == ".toml":
            data = re.sub(rb"(resume|force) = \w+", b"", data)
        found[str(path.relative_to(folder))] = data
    return found
