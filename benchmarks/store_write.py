"""Writing a shard of states: our writer against a plain file, and zarr-python, with the same bytes.

    python benchmarks/store_write.py [--layers 31] [--width 576]

Prints MB/s of float16 states (so that dtypes compare), in wall-clock and in processor time, best of the
rounds in turn. All are followed by fsync except zarr-python, which does none.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from lftpipe.store import StoreSpec, StoreWriter

CONTEXT, SEQUENCES = 512, 16


def contenders_of(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], None]], float]:
    """Every way to write the same states, and their megabytes."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(1, 0.7, options.width)).astype(np.float32)
    shape = (SEQUENCES, CONTEXT, options.width)
    blocks = [(rng.standard_normal(shape, np.float32) * spread).astype(np.float16) for _ in range(4)]
    wide = [block.astype(np.float32) for block in blocks]

    def plain_file() -> None:
        with (folder / "flat.bin").open("wb", buffering=0) as file:
            for layer in range(options.layers):
                file.write(blocks[layer % 4].data)
            os.fsync(file.fileno())

    def zarr_python() -> None:
        array = zarr.create_array(
            folder / "zarr",
            shape=(options.layers, *shape),
            chunks=(1, 1, *shape[1:]),
            shards=(options.layers, *shape),
            dtype="float16",
            compressors=Crc32cCodec(),
            fill_value=float("nan"),
            overwrite=True,
        )
        array[:] = np.stack([blocks[layer % 4] for layer in range(options.layers)])

    store = folder / "states.zarr"
    contenders = {
        "a plain file, fsync": plain_file,
        "StoreWriter float16": lambda: write_store(store, options, "float16", blocks),
        "StoreWriter float16, given float32": lambda: write_store(store, options, "float16", wide),
        "StoreWriter int8": lambda: write_store(store, options, "int8", blocks),
        "zarr-python (whole shard in memory)": zarr_python,
    }
    return contenders, options.layers * blocks[0].nbytes / 1e6


def write_store(path: Path, options: argparse.Namespace, dtype: str, given: list[np.ndarray]) -> None:
    """One shard of a new store."""
    spec = StoreSpec(
        identity={"benchmark": "write"},
        layers=tuple(range(options.layers)),
        attention_layers=(),
        context=CONTEXT,
        width=options.width,
        dtype=dtype,
        sequences_per_shard=SEQUENCES,
        sequences={"train": SEQUENCES},
    )
    with StoreWriter.open(path, spec, force=True) as writer:
        (key,) = writer.pending()
        with writer.shard(key) as shard:
            for layer in spec.layers:
                shard.put("hidden", layer, 0, given[layer % 4])


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=31)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go (default: temporary)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    contenders, size = contenders_of(options, folder)
    best = {name: (float("inf"), float("inf")) for name in contenders}
    try:
        for _ in range(options.rounds):
            for name, write in contenders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                write()
                took = time.perf_counter() - wall, time.process_time() - cpu
                best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    finally:
        shutil.rmtree(folder)
    for name, (wall, cpu) in best.items():
        ratio = best["a plain file, fsync"][0] / wall
        speeds = f"{size / wall:6.0f} MB/s, {size / cpu:6.0f} per core-second"
        print(f"{name:38} {speeds}   {ratio:5.2f} of the plain file")


if __name__ == "__main__":
    main()
