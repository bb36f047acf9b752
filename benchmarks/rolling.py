"""A training run over 20 times the bytes that its store may have on the disk, killed on both sides.

    python benchmarks/rolling.py [--kills 3] [--shards 104] [--seed 0]

A whole store and a rolling one are made of the same text. On the whole one a run is trained with the rolling
store's windows; on the rolling one with `extract --rolling` beside it, while both are killed without warning
(`kill -9`) at random moments and typed again. Then weights are compared byte for byte, and so are the
shards that are on the disk in the end. Prints JSON; fails if a byte differs, or if there was ever more on
the disk than the cap.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lftpipe.files import file_digest
from lftpipe.store import StoreSpec, registered
from lftpipe.store.windows import most_bytes
from lftpipe.teacher.source import open_teacher

#: Sequences of a shard, and of a batch of teacher and run; shards of a window; those that fit under the cap.
SHARD, WINDOW, CAP = 4, 2, 5


class Command:
    """A command of lftpipe that is typed again whenever it was killed."""

    def __init__(self, *words: str) -> None:
        self._words = [sys.executable, "-m", "lftpipe", *words, "--json"]
        self.kills = 0
        self._start()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._words, stdout=pipe, stderr=pipe, text=True)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it without warning, and type it again."""
        if self.running:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            self.kills += 1
            self._start()

    def result(self) -> dict[str, Any]:
        """What it says in the end."""
        out, err = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(err)
        return json.loads(out)


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


def compare(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Both runs, and what came of them."""
    m, n = map(int, given.layers.split(","))
    teacher = open_teacher(given.model, folder)
    spec = StoreSpec(
        identity={},
        layers=(m, n),
        attention_layers=(),
        context=given.context,
        width=teacher.width,
        dtype="float16",
        sequences_per_shard=SHARD,
        sequences={},
    )
    shard, sequences = most_bytes(spec, SHARD), given.shards * SHARD
    tokens, batch = str(sequences * given.context), str(SHARD * given.context)
    same = ["--tokens", tokens, "--batch-tokens", batch, "--compute-dtype", "float32", "--threads", "1"]
    extract = ["extract", "--model", given.model, "--layers", given.layers, "--context", str(given.context)]
    extract += ["--no-attention", "--validation-tokens", batch, *same]
    extract += ["--shard-bytes", str(2 * SHARD * given.context * teacher.width * 2)]
    extract += ["--corpus", given.corpus] if given.corpus else []
    train = ["train", "--block", f"{m}:{n}", "--run", "run", "--resume", *same]
    whole, rolling = (folder / name / "states.zarr" for name in ("whole", "rolling"))
    Command(*extract, "--store", str(whole)).result()
    Command(*train, "--store", str(whole), "--window", str(WINDOW * SHARD)).result()
    watch = Watch(rolling)
    watch.start()
    producer = Command(*extract, "--store", str(rolling), "--rolling", str(CAP * shard))
    while producer.running and not (rolling / "manifest.json").exists():
        time.sleep(0.01)
    run = Command(*train, "--store", str(rolling))
    rng = random.Random(given.seed)
    moments = sorted(rng.uniform(0, 0.9) * sequences for _ in range(2 * given.kills))
    kill_at_random(rolling, [run, producer], moments, rng)
    trained, told = run.result(), producer.result()
    weights = [file_digest(store.parent / "runs/run/flow.safetensors") for store in (whole, rolling)]
    shards = [file.relative_to(rolling) for file in rolling.glob("*/*/c.*")]
    return {
        "weights_equal": weights[0] == weights[1],
        "shards_equal": all(file_digest(whole / file) == file_digest(rolling / file) for file in shards),
        "steps": trained["steps"],
        "states_bytes": sum(file.stat().st_size for file in whole.glob("train/hidden/c.*")),
        "cap_bytes": CAP * shard,
        "most_bytes_seen": watch.most,
        "kills": {"train": run.kills, "extract": producer.kills},
        "last_producer": told["rolling"],
    }


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the stores go; default: a temporary folder")
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--corpus", help="default: the teacher's")
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--shards", type=int, default=104, help="of four training sequences")
    parser.add_argument("--kills", type=int, default=3, help="of each side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="lftpipe-rolling-", dir=given.folder) as folder:
        found = compare(Path(folder), given)
    print(json.dumps(found, indent=2))
    within = found["most_bytes_seen"] <= found["cap_bytes"]
    if not (found["weights_equal"] and found["shards_equal"] and within):
        sys.exit("the two differ, or the disk held more than the cap")


if __name__ == "__main__":
    main()
