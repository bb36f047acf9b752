"""The whole pipeline on an object store, and random reads of two states: bucket, bucket with cache, folder.

    python benchmarks/object_store.py [--sequences 48] [--layers 13] [--width 384] [--rounds 9]

An S3 server of this machine (moto, in a process of its own, one thread of Python) stands in for a cloud: the
ratios show what the client costs and what the cache saves, not what a network gives. Prints JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from s3_server import credentials, make_bucket, s3_server

from lftpipe.storage.places import mirror_of
from lftpipe.store import Store, StoreSpec, StoreWriter, batch_sequences

CONTEXT, BATCH, STEPS = 256, 8, 4


def make_store(path: Path, options: argparse.Namespace) -> float:
    """Write random states; the seconds that it took."""
    spec = StoreSpec(
        identity={"benchmark": "objects"},
        layers=tuple(range(options.layers)),
        attention_layers=(),
        context=CONTEXT,
        width=options.width,
        dtype="float16",
        sequences_per_shard=16,
        sequences={"train": options.sequences},
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (options.sequences, CONTEXT), dtype=np.int32)
    block = rng.standard_normal((16, CONTEXT, options.width), np.float32).astype(np.float16)
    started = time.perf_counter()
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", ids, ids)
        for key in writer.pending():
            with writer.shard(key) as shard:
                for layer in spec.layers:
                    shard.put("hidden", layer, 0, block[: len(key.sequences)])
        writer.finish()
    return time.perf_counter() - started


def compare_reads(url: str, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """MB/s of random batches of two states, every way in turn, the median of the rounds."""
    local, there = folder / "states.zarr", mirror_of(f"{url}/reads") / "states.zarr"
    written = {"folder": make_store(local, options), "bucket": make_store(there, options)}
    out = np.empty((2, BATCH, CONTEXT, options.width), np.float16)
    plan: list[tuple[list[int], np.ndarray]] = []

    def draw(turn: int) -> None:
        rng = np.random.default_rng(turn)
        plan[:] = [
            (
                rng.permutation(options.layers)[:2].tolist(),
                batch_sequences(options.sequences, BATCH, turn, step),
            )
            for step in range(STEPS)
        ]

    def read(store: Store) -> None:
        for layers, wanted in plan:
            for half, layer in zip(out, layers, strict=True):
                store.read("train", layer, wanted, out=half)

    kept = mirror_of(f"{url}/reads", folder / "kept", 2**34) / "states.zarr"
    opened = {"folder": Store.open(local), "bucket": Store.open(there), "cache": Store.open(kept)}

    def cold() -> None:
        shutil.rmtree(folder / "kept/ranges", ignore_errors=True)
        read(Store.open(kept))

    contenders: dict[str, Callable[[], None]] = {
        "folder": lambda: read(opened["folder"]),
        "bucket": lambda: read(opened["bucket"]),
        "bucket, empty cache": cold,
        "bucket, full cache": lambda: read(opened["cache"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds):
        draw(turn)
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - started) / STEPS)
    middle = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    return {
        "write_seconds": {name: round(took, 2) for name, took in written.items()},
        "read_MB_per_second": {name: round(out.nbytes / took / 1e6, 1) for name, took in middle.items()},
        "of_the_folder": {name: round(middle["folder"] / took, 4) for name, took in middle.items()},
    }


def pipeline(url: str, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of every command, on a folder and on the bucket; each a process of its own."""
    small = ["--tokens", "8192", "--validation-tokens", "2048", "--context", "256"]
    commands = {
        "extract": small,
        "verify": [],
        "recouple": ["--batches", "2"],
        "train": ["--block", "3:5", "--tokens", "8192", "--run", "first"],
        "evaluate": ["first", "--k", "1"],
    }
    took: dict[str, dict[str, float]] = {}
    for name, options in commands.items():
        took[name] = {}
        for where, place in (("folder", str(folder / "data")), ("bucket", f"{url}/work")):
            started = time.perf_counter()
            command = [sys.executable, "-m", "lftpipe", name, *options, "--workspace", place, "--json"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            took[name][where] = round(time.perf_counter() - started, 1)
    return took


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-pipeline", action="store_true", help="only the reads")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ["LFTPIPE_CACHE"] = str(folder / "mirrors")
    try:
        with s3_server() as endpoint:
            os.environ |= credentials(endpoint)
            url = make_bucket(endpoint, "bucket")
            found: dict[str, object] = {"reads": compare_reads(url, folder, options)}
            if not options.no_pipeline:
                found["pipeline_seconds"] = pipeline(url, folder)
        print(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
