"""Orthogonalising an update of a layer of SmolLM2's shapes: one by one, in stacks, by products of rows.

    python benchmarks/muon_speed.py [--rounds 3] [--bfloat16]

Processor seconds of one thread; the best of the rounds counts. `--bfloat16` also times torch's own format,
which takes twenty times as long on a processor that only emulates it.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lftpipe.training import optimizer

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (576, 1536), (576, 1536), (576, 1536)]
GIVEN = ((3.4445, -4.775, 2.0315), 5, 1e-7)


def stacks() -> list[Tensor]:
    """The matrices, lying, by their shapes."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [
        torch.stack([each for each in matrices if each.shape == shape]) for shape in dict.fromkeys(SHAPES)
    ]


def main() -> None:
    """Time the ways in turn and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="time torch's own format too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work, wide = stacks(), optimizer.WIDE

    def run(dtype: torch.dtype, parts: list[Tensor], from_columns: float) -> Callable[[], None]:
        def once() -> None:
            optimizer.WIDE = from_columns
            for part in parts:
                optimizer.orthogonalised(part, *GIVEN, dtype)

        return once

    alone = [matrix[None] for stack in work for matrix in stack]
    ways = {
        "float32, one by one": run(torch.float32, alone, float("inf")),
        "float32, one product for a shape": run(torch.float32, work, float("inf")),
        "float32, and by products of rows": run(torch.float32, work, wide),
    }
    if options.bfloat16:
        ways["bfloat16, as torch.optim.Muon"] = run(torch.bfloat16, work, wide)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, once in ways.items():
            began = time.process_time()
            once()
            seconds[name].append(time.process_time() - began)
    for name, taken in seconds.items():
        print(f"  {name:36}{min(taken):7.2f} s")


if __name__ == "__main__":
    main()
