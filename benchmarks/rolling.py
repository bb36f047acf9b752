"""A training run over 20 times the bytes that its store may have on the disk, killed on both sides.

A whole store and a rolling one are made of the same text. On the whole one a run is trained with the rolling
store's windows; on the rolling one with `extract --rolling` beside it, while both are killed without warning
(`kill -9`) at random moments and typed again. Then weights and shards are compared byte for byte.
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

from lftpipe.files import file_digest
from lftpipe.store import planned_spec, registered
from lftpipe.store.windows import Windows, most_bytes

#: Sequences of a shard, and of a batch of teacher and run.
SHARD = 4


class Command:
    """A command of lftpipe that is typed again whenever it was killed."""

    def __init__(self, *words: str) -> None:
        self._words = [sys.executable, "-m", "lftpipe", *words, "--json"]
        self.kills = 0
        self.start()

    def start(self) -> None:
        """Type it."""
        self._process = subprocess.Popen(self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(self) -> None:
        """End it without warning; type it again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self.kills += 1
            self._process.communicate()
            self.start()

    def result(self) -> dict[str, object]:
        """What it said in the end."""
        out, err = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(err)
        return json.loads(out)


class Watch(threading.Thread):
    """Looks at the disk all the time."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.most = store, 0

    def run(self) -> None:
        """Until the program ends."""
        while True:
            self.most = max(self.most, state_bytes(self.store))
            time.sleep(0.01)


def state_bytes(store: Path) -> int:
    """Bytes of states on the disk now, unfinished files included."""
    sizes = []
    for file in store.glob("*/*/c.*"):
        try:
            sizes.append(file.stat().st_size if file.parent.name not in ("tokens", "document") else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


def positions(store: Path) -> int:
    """Where the run stands, as its producer knows it."""
    return max((reader.position for reader in registered(store).values()), default=0)


def kill_at_random(store: Path, end: int, sides: list[Command], kills: int, seed: int) -> None:
    """Kill each side so many times, spread over the run."""
    rng = random.Random(seed)
    moments = sorted((rng.uniform(0, 0.95) * end, number % len(sides)) for number in range(kills * len(sides)))
    for position, side in moments:
        while positions(store) < position and sides[1].running:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        sides[side].kill()


def main() -> None:
    """Print a table, and fail if a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the stores go; default: a temporary folder")
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--corpus", default="python-stdlib")
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--shards", type=int, default=104, help="of four training sequences")
    parser.add_argument("--kills", type=int, default=3, help="of each side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="lftpipe-rolling-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    store = ["extract", "--model", given.model, "--corpus", given.corpus, "--layers", given.layers]
    store += ["--context", str(given.context), "--no-attention", "--compute-dtype", "float32", "--threads", "1"]
    store += ["--tokens", str(given.shards * SHARD * given.context), "--shard-bytes"]
    store += ["--validation-tokens", str(SHARD * given.context), "--batch-tokens", str(SHARD * given.context)]
    m, n = given.layers.split(",")
    train = ["train", "--block", f"{m}:{n}", "--batch-tokens", str(SHARD * given.context), "--threads", "1"]
    train += ["--tokens", str(given.shards * SHARD * given.context), "--compute-dtype", "float32", "--resume"]
    compare(folder, store, train, given.kills, given.seed)


if __name__ == "__main__":
    main()
