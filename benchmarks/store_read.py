"""Random two-layer batches: our reader against `numpy.memmap` and zarr-python, on the same bytes, warm.

    python benchmarks/store_read.py [--sequences 48] [--layers 31] [--width 576] [--dtype float16]

Prints MB/s of decoded states and the ratio to the memory map; every contender reads the same batches in turn,
the median of the rounds counts. The memory map is copied into the batch's memory, as training needs it.
"First time" opens the store anew, and so its shards, and compares every chunk's checksum.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from lftpipe.store import Store, StoreSpec, StoreWriter, batch_sequences

CONTEXT, BATCH, STEPS = 512, 8, 6


def make_store(path: Path, layers: int, sequences: int, width: int, dtype: str) -> None:
    """States like a language model's: channels of uneven spread."""
    spec = StoreSpec(
        identity={"benchmark": "read"},
        layers=tuple(range(layers)),
        attention_layers=(),
        context=CONTEXT,
        width=width,
        dtype=dtype,
        sequences_per_shard=16,
        sequences={"train": sequences},
    )
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(1, 0.7, width)).astype(np.float32)
    ids = rng.integers(0, 1000, (sequences, CONTEXT), dtype=np.int32)
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", ids, ids)
        for key in writer.pending():
            with writer.shard(key) as shard:
                for layer in spec.layers:
                    block = rng.standard_normal((len(key.sequences), CONTEXT, width), np.float32) * spread
                    shard.put("hidden", layer, 0, block)
        writer.finish()


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--layers", type=int, default=31)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "int8"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go (default: temporary)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        compare(folder, options)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Read the same random batches in every way, in turn, and print the medians."""
    make_store(folder / "states.zarr", options.layers, options.sequences, options.width, options.dtype)
    store = Store.open(folder / "states.zarr")
    decoded = store.spec.decoded_dtype
    shape = (options.layers, options.sequences, CONTEXT, options.width)
    flat = np.memmap(folder / "flat.bin", decoded, "w+", shape=shape)
    for layer in range(options.layers):
        store.read("train", layer, range(options.sequences), out=flat[layer])
    flat.flush()
    array = zarr.open_group(folder / "states.zarr", mode="r")["train/hidden"]
    assert isinstance(array, zarr.Array)
    out, wide = (np.empty((2, BATCH, *shape[2:]), dtype) for dtype in (decoded, np.float32))
    plan: list[tuple[list[int], np.ndarray]] = []

    def draw(turn: int) -> None:
        """Other layers and sequences each round: a processor's cache holds no store of usual size."""
        rng = np.random.default_rng(turn)
        plan[:] = [
            (
                rng.permutation(options.layers)[:2].tolist(),
                batch_sequences(options.sequences, BATCH, turn, step),
            )
            for step in range(STEPS)
        ]

    def from_memmap() -> None:
        for layers, wanted in plan:
            for half, layer in zip(out, layers, strict=True):
                for row, sequence in zip(half, wanted, strict=True):
                    row[...] = flat[layer, sequence]

    def from_store(store: Store, into: np.ndarray) -> None:
        for layers, wanted in plan:
            for half, layer in zip(into, layers, strict=True):
                store.read("train", layer, wanted, out=half)

    def from_zarr() -> None:
        for layers, wanted in plan[:2]:
            for half, layer in zip(out, layers, strict=True):
                for row, sequence in zip(half, wanted.tolist(), strict=True):
                    row[...] = array[layer, sequence]

    contenders: dict[str, tuple[Callable[[], None], int]] = {
        "numpy.memmap": (from_memmap, STEPS),
        "Store.read": (lambda: from_store(store, out), STEPS),
        "Store.read, first time": (lambda: from_store(Store.open(store.path), out), STEPS),
        "zarr-python": (from_zarr, 2),
    }
    if options.dtype != "float32":
        contenders["Store.read to float32"] = (lambda: from_store(store, wide), STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds):
        draw(turn)
        for name, (run, steps) in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / steps)
    tell(seconds, out.nbytes)


def tell(seconds: dict[str, list[float]], num_bytes: int) -> None:
    """Print each median without the first round, which warms up."""
    middle = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    for name, took in middle.items():
        ratio = middle["numpy.memmap"] / took
        print(f"{name:24} {num_bytes / took / 1e6:8.0f} MB/s   {ratio:5.2f} of numpy.memmap")


if __name__ == "__main__":
    main()
