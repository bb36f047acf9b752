"""Training from the cache against the same training with the teacher live: tokens/s, ratio, wait for data.

    python benchmarks/train_speed.py --store data/smollm2-135m/states.zarr --block 12:20

The same run in turn from the store and with `--from-teacher`, in one process; the rounds' median counts.
Of each only the loop counts, from the first batch to the last step.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.config.settings.base import default_workspace


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="where the teacher is")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--block", required=True)
    parser.add_argument("--objective", default="sfm", choices=("sfm", "fw", "regression"))
    parser.add_argument("--solver", default="euler", choices=("euler", "midpoint"))
    parser.add_argument("--tokens", type=int, default=40_960, help="of each run")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[bool, list[float]] = {False: [], True: []}
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for live in (False, True):
                result = train(
                    TrainSettings(
                        workspace=options.workspace,
                        store=options.store,
                        block=options.block,
                        objective=options.objective,
                        solver=options.solver,
                        tokens=options.tokens,
                        batch_tokens=options.batch_tokens,
                        threads=options.threads,
                        from_teacher=live,
                        run=str(Path(folder) / f"{turn}-{live}"),
                    )
                )
                rates[live].append(result["tokens_per_second"])
                if not live:
                    waits.append(result["data_wait_share"])
    cache, teacher = (statistics.median(rates[live]) for live in (False, True))
    ratios = sorted(a / b for a, b in zip(rates[False], rates[True], strict=True))
    print(f"{options.block} {options.objective}, {options.tokens:,} tokens, {options.rounds} rounds")
    print(
        f"  from the cache    {cache:9,.0f} tokens/s; waiting for data {max(waits):.2%} of the time at most"
    )
    print(f"  from the teacher  {teacher:9,.0f} tokens/s")
    print(f"  ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
