"""What a card is kept busy with: extraction against its limits, training and the time that kernels run.

    python benchmarks/random_teacher.py --out random-410m
    python benchmarks/gpu.py --model random-410m [--layers 6,18] [--tokens 200000]
    python benchmarks/gpu.py --model random-410m --train 6:18

Extraction: tokens/s of the bare trunk and of `extract`'s forward passes into a new store, in turn, medians of
the rounds; and how many tokens/s the card's bus and the disk could carry of what is stored, measured here.
Training: tokens/s of each objective from a store of Python sources, and the fraction of the time in which a
kernel ran, by torch's profiler. `--device cpu` runs the same without a card, but for the profiler's figure.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from extract_speed import contenders, in_turn, settings_of

from lftpipe.commands.extract import extract
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.config.settings.base import default_workspace
from lftpipe.runs import METRICS

#: Bytes that are moved to measure the bus and the disk.
PROBE_BYTES = 2**28

OBJECTIVES = ("sfm", "fw", "regression", "distil")


def bus_bytes_per_second(device: torch.device) -> float:
    """Bytes a second from the card to pinned memory; infinite where there is no bus between."""
    if device.type != "cuda":
        return float("inf")
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    taken = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return PROBE_BYTES / min(taken)


def disk_bytes_per_second(folder: Path) -> float:
    """Bytes a second into a new file, with fsync."""
    data = os.urandom(2**24)
    began = time.perf_counter()
    with (folder / "probe").open("wb") as file:
        for _ in range(PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    (folder / "probe").unlink()
    return PROBE_BYTES / taken


def extraction(options: argparse.Namespace, folder: Path) -> None:
    """Print tokens/s of the bare trunk and of extraction, their ratio, and what bus and disk allow."""
    device = torch.device(options.device)
    plan, positions, bare, into_store, _ = contenders(options, folder)
    seconds, _ = in_turn(plan, options, bare=bare, extraction=into_store)
    per_token = sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file()) / positions
    rates = {name: positions / statistics.median(taken) for name, taken in seconds.items()}
    limits = {
        "bare trunk": rates["bare"],
        "bus": bus_bytes_per_second(device) / per_token,
        "disk": disk_bytes_per_second(folder) / per_token,
    }
    narrowest = min(limits, key=lambda name: limits[name])
    print(f"extraction of {len(plan.layers)} states and {len(plan.attention_layers)} attention outputs")
    for name, rate in limits.items():
        print(f"  {name:12}{rate:12,.0f} tokens/s at most")
    rate = rates["extraction"]
    print(f"  {'extraction':12}{rate:12,.0f} tokens/s")
    print(
        f"  {rate / rates['bare']:.3f} of the bare trunk, {rate / limits[narrowest]:.3f} of the {narrowest}"
    )


def training(options: argparse.Namespace, folder: Path) -> None:
    """Print tokens/s of each objective and how busy the card was."""
    extraction = settings_of(options, folder, options.tokens)
    extract(extraction)
    cuda = torch.device(options.device).type == "cuda"
    for objective in OBJECTIVES:
        settings = TrainSettings(
            workspace=options.workspace,
            store=extraction.store,
            block=options.train,
            objective=objective,
            tokens=options.train_tokens,
            batch_tokens=options.train_batch_tokens,
            device=options.device,
            threads=options.threads,
            run=str(folder / f"run-{objective}"),
        )
        kinds = [torch.profiler.ProfilerActivity.CUDA] if cuda else [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            train(settings)
        last = json.loads((Path(str(settings.run)) / METRICS).read_text().splitlines()[-1])
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        told = f"kernels ran in {busy / last['seconds']:.1%} of the time" if cuda else "no card"
        print(f"  {objective:12}{last['tokens'] / last['seconds']:12,.0f} tokens/s, {told}")


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="name or folder")
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="where GGUF teachers are")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--tokens", type=int, default=200_000, help="of each round, and of the store")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "int8"))
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", default="", metavar="M:N", help="the block to train; left out, extract")
    parser.add_argument("--train-tokens", type=int, default=400_000)
    parser.add_argument("--train-batch-tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    parser.add_argument("--folder", type=Path, default=None, help="where stores go (default: temporary)")
    options = parser.parse_args()
    options.corpus, options.logits = "python-stdlib", 0
    device = torch.device(options.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (training if options.train else extraction)(options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
