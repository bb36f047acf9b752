"""Whether two checkouts give the same results to the bit: a refactor must, before it is merged.

    git worktree add ../before main
    python benchmarks/same_results.py --against ../before

In each checkout: 20,000 tokens of pythia-tiny are extracted in float32, two batches of every pair of states
are mapped, and `regression` and `fw` are trained from seed 0. The store's fingerprint, the map's ratios and
the digests of both runs' weights must be equal. It takes two minutes for each checkout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]

#: What is run, in order.
COMMANDS = (
    "extract --model pythia-tiny --tokens 20000 --validation-tokens 4096 --dtype float32 "
    "--compute-dtype float32",
    "recouple --batches 2",
    "train --block 5:8 --objective regression --tokens 20480 --seed 0 --run regression",
    "train --block 5:8 --objective fw --tokens 20480 --seed 0 --run fw",
)


def results_of(checkout: Path, folder: Path) -> dict[str, Any]:
    """What the checkout computes, by a name for each result.

    Parameters
    ----------
    checkout
        Whose package is run.
    folder
        Where its files go.
    """
    # The older of two checkouts may know no other format than this.
    settings = checkout / "lftpipe/config/settings/train.py"
    muon = "--muon-dtype bfloat16" if settings.exists() and "muon_dtype" in settings.read_text() else ""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    options = ["--threads", "1", "--workspace", str(folder), "--json"]
    for given in COMMANDS:
        command = f"{given} {muon}" if given.startswith("train") else given
        print(f"{checkout}: {command}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "lftpipe", *command.split(), *options],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{command} failed in {checkout}:\n{done.stderr[-2000:]}")
    here = folder / "pythia-tiny"
    found = json.loads((here / "recoupling.json").read_text())
    results = {"store fingerprint": found["store_fingerprint"]}
    results |= {f"map, {key}": found[key] for key in ("ratio", "ratio_raw", "ratio_stderr")}
    for run in ("regression", "fw"):
        manifest = json.loads((here / "runs" / run / "manifest.json").read_text())
        results[f"weights of {run}"] = manifest["weights_digest"]
    return results


def main() -> None:
    """Run both and compare; exit status 1 where a result differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        after = results_of(HERE, Path(ours))
        before = results_of(options.against.resolve(), Path(theirs))
    different = 0
    for name, value in after.items():
        same = value == before[name]
        different += not same
        shown = value if isinstance(value, str) else f"{len(value)} x {len(value)}"
        print(f"{'equal    ' if same else 'DIFFERENT'}  {name}  {shown}")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
