"""Extraction of all states and attention outputs against SAELens's extraction of one state.

    python -m venv saelens-venv
    saelens-venv/bin/pip install torch==<the version here> sae-lens
    python benchmarks/extract_vs_saelens.py --saelens-python saelens-venv/bin/python --model DIR [--threads 2]

SAELens needs an environment of its own; install torch first, from where you have it (on Linux pip's default
is a CUDA build of gigabytes). `--model` is a local folder in transformers' format, which both load: after
`make smollm2` and a first extraction that is `data/smollm2-135m/teacher`.

The same random tokens go through both in turn, on the same machine in the same run, each in a process of its
own that stays loaded between rounds. Only forward and write count: `CacheActivationsRunner.run` there, here
everything from opening a new store to its final check. Neither imports, loading nor tokenising count, nor
the first round. SAELens writes one state, that of the last layer, in float32 (its default), and does not wait
for the disk; we write all of them with the attention outputs, and do.

How SAELens computes: `float32` is its default; `autocast` is its `autocast_lm` (residual stream in float32,
as ours); `bfloat16` loads the weights so (residual in bfloat16). Its buffer is its default of 2 GB, cut to
the tokens given: it writes whole buffers, at the default 868,000 tokens of SmolLM2-135M at least.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# What is compared: our compute dtype, SAELens's way of computing, and what the pair says.
PAIRS = (
    ("float32", "float32", "float32 on both sides"),
    ("bfloat16", "autocast", "bfloat16 on both sides, residual in float32"),
    ("bfloat16", "bfloat16", "bfloat16 on both sides, SAELens's residual too"),
    ("auto", "float32", "default settings of both"),
)

Work = Callable[[Path], tuple[float, int]]  # writes to a new folder: seconds, tokens written


def our_work(options: argparse.Namespace, ids: np.ndarray) -> Work:
    """One extraction by lftpipe, as a function of the folder it writes to."""
    from extract_speed import contenders

    # `--layers all --attention` by default; random tokens need no corpus.
    given = argparse.Namespace(**vars(options), corpus="python-stdlib", workspace=options.folder, logits=0)
    given.compute_dtype = options.compute
    ours = contenders(given, options.folder / options.name, ids)

    def work(out: Path) -> tuple[float, int]:
        started = time.perf_counter()
        ours.extraction()
        took = time.perf_counter() - started
        ours.plan.path.rename(out)
        return took, ours.positions

    return work


def saelens_work(options: argparse.Namespace, ids: np.ndarray) -> Work:
    """The same by SAELens's runner."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from sae_lens import (  # pyright: ignore[reportMissingImports]
        CacheActivationsRunner,
        CacheActivationsRunnerConfig,
    )

    if options.threads:
        torch.set_num_threads(options.threads)
    config = json.loads((options.model / "config.json").read_text())
    layers = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers"}[config["model_type"]]
    width, last = config["hidden_size"], config["num_hidden_layers"] - 1
    weights = "bfloat16" if options.compute == "bfloat16" else "float32"
    settings = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=str(options.model),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": weights},
        hook_name=f"{layers}.{last}",
        d_in=width,
        context_size=options.context,
        training_tokens=ids.size,
        model_batch_size=max(1, options.batch_tokens // options.context),
        buffer_size_gb=min(2.0, (ids.size * width * 4 + width) / 1e9),
        prepend_bos=False,
        autocast_lm=options.compute == "autocast",
        device="cpu",
        new_cached_activations_path=str(options.folder),
    )
    runner = CacheActivationsRunner(settings, override_dataset=Dataset.from_dict({"input_ids": ids.tolist()}))

    def work(out: Path) -> tuple[float, int]:
        runner.cfg.new_cached_activations_path = str(out)
        started = time.perf_counter()
        rows = len(runner.run())
        took = time.perf_counter() - started
        stored = Dataset.load_from_disk(str(out)).with_format("numpy")[:4]
        np.savez(out / "first.npz", tokens=stored["token_ids"], states=stored[settings.hook_name])
        return took, rows * options.context

    return work


def serve(options: argparse.Namespace) -> None:
    """A worker: for each folder named on stdin writes there, and answers with seconds and tokens."""
    work = (our_work if options.side == "ours" else saelens_work)(
        options, np.load(options.folder / "ids.npy")
    )
    print("ready", file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(Path(line.strip()))), file=sys.__stdout__, flush=True)


class Worker:
    """A process that has its model loaded and waits to be asked."""

    def __init__(self, python: str, side: str, compute: str, folder: Path) -> None:
        self.name = f"{side}-{compute}"
        self._folder = folder
        command = [python, __file__, *sys.argv[1:], "--folder", str(folder)]
        command += ["--side", side, "--compute", compute, "--name", self.name]
        self._log = (folder / f"{self.name}.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        while line := self._process.stdout.readline():
            if line.startswith(("ready", "[")):  # libraries may print too
                return line
        raise SystemExit((self._folder / f"{self.name}.log").read_text() + f"\n{self.name} died")

    def run(self) -> float:
        """Tokens a second; what is written stays until the next time."""
        assert self._process.stdin
        out = self._folder / f"{self.name}-out"
        shutil.rmtree(out, ignore_errors=True)
        print(out, file=self._process.stdin, flush=True)
        seconds, tokens = json.loads(self._answer())
        return tokens / seconds

    def close(self) -> None:
        """Let the worker end, and wait for it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def difference(folder: Path, ours: str, saelens: str) -> float:
    """NMSE between the first sequences of what both wrote: the same tokens, the same state."""
    import zarr

    first = np.load(folder / f"{saelens}-out" / "first.npz")
    split: Any = zarr.open_group(folder / f"{ours}-out", mode="r")["train"]
    count = len(first["tokens"])
    assert np.array_equal(first["tokens"], split["tokens"][:count]), "the two stores hold other tokens"
    mine, other = split["hidden"][-1, :count].astype(np.float64), first["states"].astype(np.float64)
    return float(((mine - other) ** 2).sum() / (other**2).sum())


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides in turn, each in its own process; rates and the ratios of the pairs."""
    config = json.loads((options.model / "config.json").read_text())
    count = -(-options.tokens // options.context)
    shape = (count, options.context)
    np.save(
        folder / "ids.npy", np.random.default_rng(0).integers(0, config["vocab_size"], shape, dtype=np.int32)
    )
    pairs = [(("ours", one), ("saelens", other), what) for one, other, what in PAIRS]
    sides = list(dict.fromkeys(side for *both, _ in pairs for side in both))
    python = {"ours": sys.executable, "saelens": options.saelens_python}
    workers: dict[tuple[str, str], Worker] = {}
    rates: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    try:
        for side in sides:
            workers[side] = Worker(python[side[0]], *side, folder)
        for turn in range(options.rounds + 1):
            for side in sides if turn % 2 else reversed(sides):
                rate = workers[side].run()
                if turn:  # the first sets up kernels and memory
                    rates[side].append(rate)
        nmse = difference(folder, "ours-float32", "saelens-float32")
    finally:
        for worker in workers.values():
            worker.close()
    print(
        f"{options.model}: {count * options.context:,} tokens, {options.threads or 'all'} threads, "
        f"{options.rounds} rounds; ours all states and attention outputs as {options.dtype}, "
        f"SAELens the last state as float32"
    )
    for side in sides:
        print(f"  {'-'.join(side):18} {statistics.median(rates[side]):9,.0f} tokens/s")
    found: dict[str, Any] = {"-".join(side): rates[side] for side in sides}
    found["ratios"], found["nmse"] = {}, nmse
    for one, other, what in pairs:
        ratios = sorted(a / b for a, b in zip(rates[one], rates[other], strict=True))
        found["ratios"]["-".join((*one, *other))] = statistics.median(ratios)
        print(
            f"  ours / SAELens {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}): {what}"
        )
    print(f"  NMSE between the last states of both, computed in float32: {nmse:.1e}")
    return found


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saelens-python", required=True, help="of an environment with sae-lens")
    parser.add_argument("--model", type=Path, required=True, help="a folder in transformers' format")
    parser.add_argument("--layers", default="all", help="that we extract")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each round")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="in one forward pass, on both sides")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "int8"), help="ours")
    parser.add_argument("--threads", type=int, default=0, help="of torch, on both sides; 0: its own choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go (default: temporary)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    for hidden in ("--side", "--compute", "--name"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder)).resolve()
    try:
        found = compare(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
