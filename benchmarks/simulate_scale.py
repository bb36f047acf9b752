"""A store of a million shard files without their payload: what its bookkeeping costs.

    python benchmarks/simulate_scale.py [--files 1000000] [--folder /dev/shm]

The specification, the plan, the journal and the reader are lftpipe's own. Every shard is committed to the
journal by a line of its own, the journal is read as whoever resumes reads it, the manifest is written and the
store opened, each in a process of its own. A few shards, spread over all, are real files, which the reader
reads; the others are names and sizes. The folder should be in memory: a journal's line waits for the disk,
which is not what is measured. Prints JSON; seconds, and the most memory that a process had.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lftpipe.storage import writable_storage_of
from lftpipe.store import ShardKey, Store, StoreSpec, produce_shard
from lftpipe.store.manifest import Manifest
from lftpipe.store.records import Records, begin_journal, line_of, read_journal
from lftpipe.store.shard import Record

CONTEXT, WIDTH, STEP = 2, 2, 1
#: Files of a shard: states, tokens, documents.
ARRAYS = 3
#: Shards that are real files.
REAL = 50


def spec_of(files: int) -> StoreSpec:
    """As many shards as give so many files."""
    return StoreSpec(
        identity={"simulated": files},
        layers=(0,),
        attention_layers=(),
        context=CONTEXT,
        width=WIDTH,
        dtype="float16",
        sequences_per_shard=STEP,
        sequences={"train": files // ARRAYS, "validation": 1},
    )


def real_shards(spec: StoreSpec) -> list[int]:
    """Numbers of the shards that are real files."""
    return np.linspace(0, spec.sequences["train"] - 1, REAL, dtype=int).tolist()


def records_of(path: Path, spec: StoreSpec) -> Iterator[Records]:
    """Of every shard: as `produce_shard` gives them, or made up."""
    real = set(real_shards(spec))
    for key in spec.shard_keys():
        if key.split == "train" and key.index in real:
            yield write(path, spec, key)
        else:
            yield {
                array.file(key.split, key.index): Record(
                    STEP, bytes_of(array), f"{key.index:032x}", f"{key.index:016x}"
                )
                for array in spec.arrays.values()
            }


def bytes_of(array: Any) -> int:
    """Of a shard file of one chunk: the chunk, the index, and a checksum of each."""
    itemsize = 2 if array.dtype == "float16" else 4
    return int(np.prod(array.chunk)) * itemsize + 4 + 16 * array.chunks_per_shard + 4


def write(path: Path, spec: StoreSpec, key: ShardKey) -> Records:
    """A shard that can be read: everything in it is its number."""
    with produce_shard(path, spec, key, "simulated", arrays=list(spec.arrays.values())) as shard:
        for name, array in spec.arrays.items():
            block = np.full((STEP, *array.chunk), key.index % 1000, array.dtype)
            shard.put(name, 0 if array.layers else None, 0, block)
    assert shard.sealed is not None
    shard.sealed.name(path)
    return shard.sealed.records


def commit(path: Path, spec: StoreSpec) -> dict[str, Any]:
    """A journal of all shards, one line each."""
    storage = writable_storage_of(path)
    begin_journal(storage, spec, {})
    shards = 0
    for records in records_of(path, spec):
        storage.append_log(line_of(records))
        shards += 1
    storage.close()
    return {"shards": shards, "bytes": (path / "journal.jsonl").stat().st_size}


def resume(path: Path, spec: StoreSpec) -> dict[str, Any]:
    """What whoever resumes reads, and which shards are left."""
    found = read_journal(path)
    assert found is not None
    left = sum(
        any(array.file(key.split, key.index) not in found[1] for array in spec.arrays.values())
        for key in found[0].shard_keys()
    )
    return {"left": left, "files": len(found[1])}


def finish(path: Path, spec: StoreSpec) -> dict[str, Any]:
    """The manifest of all shards."""
    found = read_journal(path)
    assert found is not None
    Manifest.write(path, spec, dict(sorted(found[1].items())), {})
    (path / "journal.jsonl").unlink()
    return {"bytes": (path / "manifest.json").stat().st_size}


def open_store(path: Path, _: StoreSpec) -> dict[str, Any]:
    """The store, by its manifest."""
    store = Store.open(path)
    return {"fingerprint": store.fingerprint}


def read(path: Path, spec: StoreSpec) -> dict[str, Any]:
    """The same, and the shards that are real files."""
    store = Store.open(path)
    real = real_shards(spec)
    started = time.perf_counter()
    states = store.read("train", 0, real)
    assert (states[:, 0, 0] == np.array(real) % 1000).all()
    assert (store.tokens("train", real)[:, 0] == np.array(real) % 1000).all()
    return {"read_milliseconds": round(1000 * (time.perf_counter() - started), 1)}


def measured(step: Callable[[Path, StoreSpec], dict[str, Any]], path: Path, files: int) -> dict[str, Any]:
    """What a step gives, its seconds, and the megabytes that its process had at most."""
    spec = spec_of(files)
    started, processor = time.perf_counter(), time.process_time()
    found = step(path, spec)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}
    return {**times, "megabytes": round(memory), **found}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put it; default: the temporary folder"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    found: dict[str, Any] = {"files": options.files}
    try:
        for step in (commit, resume, finish, open_store, read):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of one step alone
                found[step.__name__] = pool.apply(measured, (step, folder, options.files))
            print(step.__name__, found[step.__name__], flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
