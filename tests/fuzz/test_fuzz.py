"""Every reader on damaged and edited files: right, or refused in one line.

Never a traceback, another result, 2 GB of memory, or a minute. Groups of cases run in processes of their own.
`LFTPIPE_FUZZ_CASES` is how many cases each reader gets.
"""

import json
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import damaged, edited_json
from tiny_students import save_run
from training_runs import short_run, stop_before

from lftpipe import runs
from lftpipe.base.errors import LftpipeError
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.export import export
from lftpipe.commands.recouple import recouple
from lftpipe.commands.train import train
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import EvaluateSettings, ExportSettings, RecoupleSettings, TrainSettings
from lftpipe.corpus.readers import open_corpus
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.results.run import ExportSource, read_metrics
from lftpipe.results.scores import Results
from lftpipe.store import Store
from lftpipe.student.assemble import load_model
from lftpipe.teacher.source import load_tokenizer, open_teacher
from lftpipe.training.checkpoint import read_checkpoint

CASES = int(os.environ.get("LFTPIPE_FUZZ_CASES", "12"))
MEMORY, SECONDS = 2 * 10**9, 60


@dataclass(frozen=True)
class Reader:
    """A file, what reads it, and whether what is read must be what was written."""

    file: Path
    read: Callable[[], Any]
    sealed: bool = True
    kinds: tuple[str, ...] = ("damaged",)


def students(root: Path, store: Path, teacher: Any) -> dict[str, Path]:
    """A run, an unfinished run, an export, and a workspace's files."""
    run = save_run(root / "run", teacher, (1, 3), solver="euler").path
    export(ExportSettings(workspace=root, runs=(str(run),), out=root / "export", k=1))
    recouple(RecoupleSettings(store=store, tokens=16, batches=2, out=root / "map.json"))
    trained = train(short_run(store, root, run=str(root / "trained"), objective="regression"))["run"]
    evaluate(EvaluateSettings(store=store, runs=(trained,), k=(1,), out=root / "results.json"))
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(short_run(store, root, run=str(root / "stopped")))
    return {"run": Path(trained), "export": root / "export", "stopped": root / "stopped"}


def corpora(root: Path) -> dict[str, Path]:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"text {number} of a corpus\n" * 9 for number in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "a.jsonl").write_text(lines)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "a.txt").write_text("".join(texts))
    pq.write_table(pa.table({"text": texts}), root / "a.parquet")
    return {name: root / name for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet")}


def restored(path: Path) -> Any:
    data = path.read_bytes()
    try:
        return read_checkpoint(path, BINDINGS[path] if path in BINDINGS else data[8:24].hex())
    except ValueError as error:
        raise LftpipeError(str(error), "", "") from error


BINDINGS: dict[Path, str] = {}


def teacher_readers(folder: Path, root: Path) -> dict[str, Reader]:
    """Of the files of a teacher's folder."""
    both = ("damaged", "edited")

    def teacher() -> Any:
        return open_teacher(str(folder), root).num_layers

    def tokenized() -> Any:
        return load_tokenizer(open_teacher(str(folder), root))("a b")

    return {
        "teacher config": Reader(folder / "config.json", teacher, False, both),
        "teacher weights": Reader(folder / "model.safetensors", teacher, False),
        "tokenizer": Reader(folder / "tokenizer.json", tokenized, False, both),
        "tokenizer config": Reader(folder / "tokenizer_config.json", tokenized, False, both),
    }


@pytest.fixture(scope="module")
def readers(tmp_path_factory, stores, teachers) -> dict[str, Reader]:
    import shutil

    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(stores["neox"], root / "states.zarr")
    shutil.copytree(teachers["neox"], root / "teacher")
    store = root / "states.zarr"
    made = students(root, store, open_teacher(str(teachers["neox"]), root))
    run, out, newest = made["run"], made["export"], made["stopped"] / runs.CHECKPOINT
    BINDINGS[newest] = newest.read_bytes()[8:24].hex()
    digest = runs.open_run(run).metrics_digest
    recipe = root / "recipe.toml"
    recipe.write_text('[train]\nblock = "1:3"\ntokens = 64\nseed = 3\n[train.variants.a]\nalpha = 0.5\n')
    shard = next((store / "train/hidden").glob("c.*"), store / "train/hidden/c")
    shard = shard if shard.is_file() else next(path for path in shard.rglob("*") if path.is_file())
    both, edits = ("damaged", "edited"), ("damaged", "edited", "sealed")

    def metrics() -> Any:
        found = read_metrics(run / runs.METRICS, digest)
        if found.damage:
            raise LftpipeError(found.damage, "", "")
        return found.rows

    def states() -> Any:
        opened = Store.open(store)
        return [opened.read("train", layer, range(8)) for layer in opened.layers], opened.tokens("train")

    def recipe_settings() -> Any:
        return from_recipe(TrainSettings, recipe, "train", {})

    found = {
        "recoupling.json": Reader(
            root / "map.json", lambda: RecouplingMap.from_json(root / "map.json"), True, edits
        ),
        "results.json": Reader(
            root / "results.json", lambda: Results.from_json(root / "results.json"), True, edits
        ),
        "run manifest": Reader(run / runs.MANIFEST, lambda: runs.open_run(run), True, edits),
        "run settings": Reader(run / runs.SETTINGS, lambda: runs.read_settings(run), False),
        "run weights": Reader(run / runs.WEIGHTS, lambda: runs.open_run(run)),
        "metrics": Reader(run / runs.METRICS, metrics),
        "checkpoint": Reader(newest, lambda: restored(newest)),
        "lftpipe.json": Reader(out / "lftpipe.json", lambda: ExportSource.of_folder(out), True, edits),
        "export config": Reader(out / "config.json", lambda: load_model(out).config.steps, False, both),
        "export weights": Reader(out / "model.safetensors", lambda: load_model(out).config.steps, False),
        "store manifest": Reader(store / "manifest.json", states, True, edits),
        "store shard": Reader(shard, states),
        "recipe": Reader(recipe, recipe_settings, False),
    }
    found |= teacher_readers(root / "teacher", root)
    for name, path in corpora(root).items():
        found[name] = Reader(path, lambda path=path: list(open_corpus(str(path)).documents()), False)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray | torch.Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return one == other


def outcome(reader: Reader, want: Any, kind: str, seed: int, whole: bytes) -> str:
    """`read`, `refused`, or what is wrong with the case."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "damaged":
        content = damaged(whole, rng)
    else:
        content = edited_json(whole, rng, digest="seal" if kind == "sealed" else "drop")
    reader.file.write_bytes(content)
    try:
        found = reader.read()
    except LftpipeError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"long: {error}"
    except BaseException:
        return traceback.format_exc()
    if kind == "damaged" and reader.sealed and not same(found, want):
        return "another result"
    return "read"


def in_a_process(reader: Reader, kind: str, seeds: range) -> tuple[dict[str, int], list[str]]:
    """How often each outcome was, and the cases that went wrong."""
    whole = reader.file.read_bytes()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what ends a test that takes too long
        counts, wrong = {"read": 0, "refused": 0}, []
        try:
            sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
            warnings.simplefilter("ignore")
            want = reader.read()
            for seed in seeds:
                signal.alarm(SECONDS)
                found = outcome(reader, want, kind, seed, whole)
                signal.alarm(0)
                if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY + START:
                    found = "too much memory"
                if found in counts:
                    counts[found] += 1
                else:
                    wrong.append(f"{kind} {seed}: {found[-1500:]}")
        except BaseException:
            wrong.append(traceback.format_exc()[-1500:])
        with os.fdopen(send, "w") as pipe:
            json.dump([counts, wrong[:5]], pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    reader.file.write_bytes(whole)
    return json.loads(answer) if answer else ({}, [f"{kind} of {seeds}: died, status {status}"])


#: Memory of this process itself.
START = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

NAMES = (
    *(
        "recoupling.json",
        "results.json",
        "run manifest",
        "run settings",
        "run weights",
        "metrics",
        "checkpoint",
    ),
    *("lftpipe.json", "export config", "export weights", "store manifest", "store shard", "teacher config"),
    *("teacher weights", "tokenizer", "tokenizer config", "recipe"),
    *("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"),
)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_what_is_damaged_or_edited_is_read_right_or_refused_in_one_line(readers, name):
    reader, total, wrong = readers[name], {"read": 0, "refused": 0}, []
    for kind in reader.kinds:
        counts, bad = in_a_process(reader, kind, range(max(1, CASES // len(reader.kinds))))
        wrong += bad
        for key, count in counts.items():
            total[key] += count
    print(f"| {name} | {total['read'] + total['refused']} | {total['refused']} | {len(wrong)} |")
    assert not wrong, "\n".join(wrong[:3])
