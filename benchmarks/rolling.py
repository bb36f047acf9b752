"""A training run over 20 times the bytes that its store may have on the disk, killed on both sides.

    python benchmarks/rolling.py [--kills 3] [--shards 104] [--seed 0]

A whole store and a rolling one are made of the same text. On the whole one a run is trained with the rolling
store's windows; on the rolling one with `extract --rolling` beside it, while both are killed without warning
(`kill -9`) at random moments and begun again. Then weights are compared byte for byte, and so are the
shards that are on the disk in the end. Prints JSON; fails if a byte differs, or if there was ever more on
the disk than the cap.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lftpipe.base.files import file_digest
from lftpipe.commands.extract import extract
from lftpipe.commands.train import train
from lftpipe.config.settings import ExtractSettings, TrainSettings
from lftpipe.store import StoreSpec, registered
from lftpipe.store.windows import most_bytes
from lftpipe.teacher.source import open_teacher

#: Sequences of a shard, and of a batch of teacher and run; shards of a window; those that fit under the cap.
SHARD, WINDOW, CAP = 4, 2, 5


class Command:
    """A stage in a process of its own, that is begun again whenever it was killed."""

    def __init__(self, stage: Callable[[Any], Any], settings: Any, told: Path) -> None:
        self._stage, self._settings, self._told = stage, settings, told
        self.kills, self._status = 0, -1
        self._start()

    def _start(self) -> None:
        self._process = os.fork()  # quicker than a new Python, which would first import torch
        if self._process == 0:
            status = 1
            try:
                self._told.write_text(json.dumps(dict(self._stage(self._settings))))
                status = 0
            except BaseException as error:
                os.write(2, f"{error}\n".encode())
            os._exit(status)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._status < 0 and os.waitid(os.P_PID, self._process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        return self._status < 0

    def kill(self) -> None:
        """End it without warning, and begin it again."""
        if self.running:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self.kills += 1
            self._start()

    def result(self) -> dict[str, Any]:
        """What it says in the end."""
        while self.running:
            time.sleep(0.05)
        if self._status:
            raise SystemExit("a command failed")
        return json.loads(self._told.read_text())


class Watch(threading.Thread):
    """Looks at the bytes of states on the disk all the time, unfinished files included."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.most = store, 0

    def run(self) -> None:
        """Until the program ends."""
        while True:
            sizes = []
            for file in self.store.glob("*/hidden/c.*"):
                try:
                    sizes.append(file.stat().st_size)
                except FileNotFoundError:
                    continue
            self.most = max(self.most, sum(sizes))
            time.sleep(0.01)


def position(store: Path) -> int:
    """Sequences that the run's last checkpoint has passed."""
    return max((reader.position for reader in registered(store).values()), default=0)


def kill_at_random(store: Path, sides: list[Command], moments: list[float], rng: random.Random) -> None:
    """Kill the sides in turn, each time a while after the run has passed a position."""
    for number, moment in enumerate(moments):
        while position(store) < moment and sides[0].running:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        sides[number % len(sides)].kill()


def settings_of(
    folder: Path, given: argparse.Namespace
) -> tuple[ExtractSettings, ExtractSettings, TrainSettings]:
    """Of the whole store, of the rolling one, and of the run on the whole one."""
    m, n = map(int, given.layers.split(","))
    spec = StoreSpec(
        identity={},
        layers=(m, n),
        attention_layers=(),
        context=given.context,
        width=open_teacher(given.model, folder).width,
        dtype="float16",
        sequences_per_shard=SHARD,
        sequences={},
    )
    tokens, batch = given.shards * SHARD * given.context, SHARD * given.context
    whole = ExtractSettings(
        store=folder / "whole/states.zarr",
        model=given.model,
        corpus=given.corpus,
        layers=given.layers,
        attention=False,
        context=given.context,
        tokens=tokens,
        validation_tokens=batch,
        batch_tokens=batch,
        shard_bytes=SHARD * 2 * 2 * given.context * spec.width,
        compute_dtype="float32",
        threads=1,
    )
    rolling = replace(whole, store=folder / "rolling/states.zarr", rolling=CAP * most_bytes(spec, SHARD))
    run = TrainSettings(
        store=whole.store,
        block=f"{m}:{n}",
        run="run",
        tokens=tokens,
        batch_tokens=batch,
        window=WINDOW * SHARD,
        compute_dtype="float32",
        threads=1,
        resume=True,
    )
    return whole, rolling, run


def compare(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Both runs, and what came of them."""
    whole, rolling, run = settings_of(folder, given)
    assert whole.store is not None
    assert rolling.store is not None
    Command(extract, whole, folder / "extract.json").result()
    Command(train, run, folder / "train.json").result()
    watch = Watch(rolling.store)
    watch.start()
    producer = Command(extract, rolling, folder / "rolling-extract.json")
    while producer.running and not (rolling.store / "manifest.json").exists():
        time.sleep(0.01)
    trainer = Command(train, replace(run, store=rolling.store, window=0), folder / "rolling-train.json")
    rng = random.Random(given.seed)
    sequences = given.shards * SHARD
    moments = sorted(rng.uniform(0, 0.6) * sequences for _ in range(2 * given.kills))
    kill_at_random(rolling.store, [trainer, producer], moments, rng)
    trained, told = trainer.result(), producer.result()
    weights = [each.parent / "runs/run/flow.safetensors" for each in (whole.store, rolling.store)]
    shards = [file.relative_to(rolling.store) for file in rolling.store.glob("*/*/c.*")]
    states = sum(file.stat().st_size for file in whole.store.glob("train/hidden/c.*"))
    return {
        "weights_equal": file_digest(weights[0]) == file_digest(weights[1]),
        "shards_equal": all(file_digest(whole.store / f) == file_digest(rolling.store / f) for f in shards),
        "steps": trained["steps"],
        "states_bytes": states,
        "cap_bytes": rolling.rolling,
        "times_the_cap": round(states / (rolling.rolling or 1), 1),
        "most_bytes_seen": watch.most,
        "kills": {"train": trainer.kills, "extract": producer.kills},
        "last_producer": told["rolling"],
    }


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the stores go; default: a temporary folder")
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--corpus", help="default: the teacher's")
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--shards", type=int, default=104, help="of four training sequences")
    parser.add_argument("--kills", type=int, default=3, help="of each side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process with more cannot be forked
    with tempfile.TemporaryDirectory(prefix="lftpipe-rolling-", dir=given.folder) as folder:
        found = compare(Path(folder), given)
    print(json.dumps(found, indent=2))
    within = found["most_bytes_seen"] <= found["cap_bytes"]
    if not (found["weights_equal"] and found["shards_equal"] and within):
        sys.exit("the two differ, or the disk held more than the cap")


if __name__ == "__main__":
    main()
