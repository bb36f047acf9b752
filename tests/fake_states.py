"""A teacher for tests of the store: states that are a pure function of array, layer and sequence."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lftpipe.base.files import read_sealed, write_sealed
from lftpipe.store import ShardWriter, StoreSpec, StoreWriter

SPLITS = ("train", "validation")


def make_spec(**changes) -> StoreSpec:
    settings = {
        "identity": {"teacher": {"name": "fake", "revision": "a1"}, "seed": 0},
        "layers": (0, 2, 3),
        "attention_layers": (2, 3),
        "context": 6,
        "width": 40,
        "dtype": "float16",
        "sequences_per_shard": 4,
        "sequences": {"train": 10, "validation": 3},
    }
    return StoreSpec(**settings | changes)


def states(spec: StoreSpec, split: str, array: str, layer: int, sequences) -> np.ndarray:
    """(sequence, position, feature) float32"""
    shape = (spec.context, spec.width)
    front = [SPLITS.index(split), ("hidden", "attention").index(array), layer]
    rows = [np.random.default_rng([*front, sequence]).normal(0, 3, shape) for sequence in sequences]
    return np.array(rows, np.float32).reshape(-1, *shape)


def tokens(spec: StoreSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    shape = (spec.sequences[split], spec.context)
    ids = (np.arange(np.prod(shape)) * 7 % 101).astype(np.int32).reshape(shape)
    return ids, ids // 10


def fill(shard: ShardWriter, spec: StoreSpec, batch: int = 3) -> None:
    """One shard, in batches of sequences, layer by layer, as an extraction does it."""
    wanted = shard.key.sequences
    for first in range(0, len(wanted), batch):
        for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
            for layer in layers:
                block = states(spec, shard.key.split, array, layer, wanted[first : first + batch])
                shard.put(array, layer, first, block)


def write(path: Path, spec: StoreSpec, **options) -> list:
    """Extract all that is pending, and finish; the shards written."""
    with StoreWriter.open(path, spec, **options) as writer:
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        written = writer.pending()
        for key in written:
            with writer.shard(key) as shard:
                fill(shard, spec)
        writer.finish()
    return written


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed file's content, and seal it again: its digest is right."""
    value = read_sealed(path)
    change(value)
    write_sealed(path, value)


def environment(*folders: Path) -> dict[str, str]:
    """For a Python that finds lftpipe, and the distributions in these folders."""
    paths = [*map(str, folders), str(Path(__file__).parents[1]), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":  # a writer to be killed: path, train sequences, validation sequences
    write(Path(sys.argv[1]), make_spec(sequences=dict(zip(SPLITS, map(int, sys.argv[2:]), strict=True))))
