"""Extraction of all states and attention outputs against the bare trunk, and its peak memory.

    python benchmarks/extract_speed.py [--model pythia-tiny] [--tokens 16384] [--context 512] [--threads 2]

Speed: in one process, with one loaded trunk, the same batches of random tokens go through the trunk alone and
through extraction into a new store, in turn: opening it, computing, rounding, checksums, writing, fsync, the
final check. The medians of the rounds count, and the median of the rounds' ratios. The first batch of either
is not counted. `--model` may be a folder: `random_teacher.py` makes one of Pythia-410M's size.

Memory: the whole of `lftpipe extract` in a process of its own for each of `--memory-tokens` of `--corpus`,
and what `getrusage` says was resident at most. `--memory-tokens ""` leaves it out, `--rounds 0` the speed.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# torch is imported only after the processes for the memory were run: a process inherits its parent's peak.


def settings_of(options: argparse.Namespace, folder: Path, tokens: int) -> Any:
    """What `extract` is asked for in every round."""
    from lftpipe.config.settings import ExtractSettings

    return ExtractSettings(
        workspace=options.workspace,
        store=folder / "states.zarr",
        model=options.model,
        corpus=options.corpus,
        layers=options.layers,
        tokens=tokens,
        validation_tokens=0,
        context=options.context,
        batch_tokens=options.batch_tokens,
        dtype=options.dtype,
        compute_dtype=options.compute_dtype,
        logits=options.logits,
        threads=options.threads,
        device=options.device,
        force=True,
    )


def peak(options: argparse.Namespace, folder: Path, tokens: int) -> dict[str, Any]:
    """Extract in this process; MiB that were resident at most."""
    from lftpipe.base.allocator import keep_freed_memory
    from lftpipe.commands.extract import extract

    keep_freed_memory()
    result = extract(settings_of(options, folder, tokens))
    return {
        "tokens": sum(result["tokens"].values()),
        "bytes": result["bytes"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def memory(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of an extraction of each size, each in a process of its own."""
    found = []
    for tokens in map(int, filter(None, options.memory_tokens.split(","))):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", str(tokens), "--folder", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{found[-1]['tokens']:>9,} tokens: {found[-1]['peak_mib']:,.0f} MiB resident at most")
    if len(found) > 1:
        print(f"largest to smallest peak: {found[-1]['peak_mib'] / found[0]['peak_mib']:.3f}")
    return found


class Contenders(NamedTuple):
    """One loaded trunk, to be run alone or as an extraction into a new store."""

    plan: Any
    positions: int
    bare: Callable[[], None]
    """Batch after batch, each by all threads."""
    extraction: Callable[[], None]
    lanes: Callable[[], None]
    """As extraction does on a processor: several batches side by side, each by one thread."""


def contenders(options: argparse.Namespace, folder: Path, ids: Any = None) -> Contenders:
    """Load the trunk and run its first batch; `ids` are the tokens (sequence, position), or random ones."""
    import numpy as np
    import torch

    from lftpipe.base.allocator import keep_freed_memory
    from lftpipe.data.batches import make_batch
    from lftpipe.extraction.forward import Passes
    from lftpipe.extraction.plan import make_plan
    from lftpipe.store import StoreSpec, StoreWriter
    from lftpipe.teacher.thread_pool import Lanes

    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = make_plan(settings_of(options, folder, options.tokens))
    trunk = plan.load_trunk()
    count = plan.wanted["train"]
    if ids is None:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, plan.teacher.config.vocab_size, (count, plan.context), dtype=np.int32)
    tokens = {"train": (ids, np.zeros_like(ids))}
    spec = StoreSpec(
        identity={"benchmark": "extract", "batch_sequences": plan.batch_sequences},
        layers=plan.layers,
        attention_layers=plan.attention_layers,
        context=plan.context,
        width=plan.teacher.width,
        dtype=plan.dtype,
        sequences_per_shard=plan.sequences_per_shard,
        sequences={"train": count},
        logits=plan.logits,
    )

    starts = range(0, count, plan.batch_sequences)
    count_lanes = torch.get_num_threads() if trunk.device.type == "cpu" else 1
    trunks = [trunk, *(trunk.twin() for _ in range(count_lanes - 1))]

    def run(lane: int, first: int) -> None:
        rows = slice(first, min(first + plan.batch_sequences, count))
        batch = make_batch(tokens["train"][0][rows], tokens["train"][1][rows], trunk.device)
        trunks[lane].run(batch.tokens, batch.position_ids)

    def bare() -> None:
        for first in starts:
            run(0, first)

    def side_by_side() -> None:
        with Lanes(len(trunks)) as lanes:
            deque(lanes.map(run, starts), maxlen=0)

    def extraction() -> None:
        with StoreWriter.open(plan.path, spec) as writer:
            writer.put_tokens("train", *tokens["train"])
            passes = Passes(plan.path, spec, trunk, plan.load_head(), "benchmark", plan.batch_sequences)
            passes.run(writer.pending(), writer.commit, lambda _: None)
            writer.finish()

    run(0, 0)
    return Contenders(plan, count * plan.context, bare, extraction, side_by_side)


def in_turn(
    plan: Any, options: argparse.Namespace, **runs: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of every round of each, by name; none is always the first."""
    import torch

    on_card = torch.device(options.device).type == "cuda"
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name in runs if turn % 2 else reversed(runs):
            if name == "extraction":  # it begins a new store
                shutil.rmtree(plan.path, ignore_errors=True)
            began, used = time.perf_counter(), time.process_time()
            runs[name]()
            if on_card:
                torch.cuda.synchronize(options.device)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    return wall, processor


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of the bare trunk and of the extraction, in turn, and their ratio."""
    import torch

    plan, positions, bare, extraction, lanes = contenders(options, folder)
    seconds, processor = in_turn(plan, options, bare=bare, extraction=extraction, lanes=lanes)
    size = sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file())
    rates = {name: positions / statistics.median(taken) for name, taken in seconds.items()}
    pairs = zip(seconds["bare"], seconds["extraction"], strict=True)
    ratios = sorted(one / other for one, other in pairs)
    cpu = statistics.median(processor["bare"]) / statistics.median(processor["extraction"])
    kind = str(plan.compute_dtype).removeprefix("torch.")
    print(
        f"{plan.teacher.name}: {len(plan.layers)} states, {len(plan.attention_layers)} attention outputs, "
        f"{plan.dtype}, computed in {kind}, {torch.get_num_threads()} threads, {positions:,} tokens, "
        f"{size / 2**20:,.0f} MiB, {options.rounds} rounds"
    )
    print(f"  bare trunk, batch after batch  {rates['bare']:9,.0f} tokens/s")
    print(f"  bare trunk, side by side       {rates['lanes']:9,.0f} tokens/s")
    print(f"  extraction                     {rates['extraction']:9,.0f} tokens/s")
    ratio = statistics.median(ratios)
    print(f"  ratio {ratio:.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}); of processor seconds {cpu:.3f}")
    return {"tokens_per_second": rates, "ratios": ratios, "ratio": ratio, "processor_ratio": cpu}


def main() -> None:
    """Read the options, run, and print what was found."""
    from lftpipe.config.settings.base import default_workspace

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="where GGUF teachers are")
    parser.add_argument("--corpus", default="python-stdlib", help="for the memory; speed takes random tokens")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each round")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "int8"))
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--logits", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-tokens", default="20000,200000")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go (default: temporary)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    parser.add_argument("--peak", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if options.peak:
            print(json.dumps(peak(options, folder, options.peak)))
            return
        found: dict[str, Any] = {"memory": memory(options, folder)}
        if options.rounds:
            found["speed"] = speed(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
