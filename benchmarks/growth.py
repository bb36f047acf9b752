"""What a large extraction needs, computed: bytes, files, requests, hours and money, as a Markdown table.

    python benchmarks/growth.py

Nothing is measured here. Bytes, shards and journal lines come from lftpipe's own specification and journal;
rates and prices are the options, printed below the table.
"""

import argparse
import math
from dataclasses import dataclass

from lftpipe.extraction.plan import LARGE_SHARD_BYTES, MOST_SHARD_SEQUENCES, state_bytes
from lftpipe.storage.bucket import PART_BYTES
from lftpipe.store import StoreSpec
from lftpipe.store.records import line_of
from lftpipe.store.shard import Record

CONTEXT, BATCH_TOKENS, PER_MACHINE = 512, 2048, 8


@dataclass(frozen=True)
class Case:
    """A teacher, and what is stored of it."""

    name: str
    tokens: float
    width: int
    states: int
    parameters: float
    """That a token passes below the deepest state."""
    gpus: int
    dtype: str


CASES = (
    Case("Pythia-410M, h6 and h18, 2.6e9 tokens, float16", 2.6e9, 1024, 2, 18 * 12 * 1024**2, 8, "float16"),
    Case("the same, int8", 2.6e9, 1024, 2, 18 * 12 * 1024**2, 8, "int8"),
    Case("8B teacher, all 33 states, 1e9 tokens, float16", 1e9, 4096, 33, 8e9, 64, "float16"),
    Case("the same, int8", 1e9, 4096, 33, 8e9, 64, "int8"),
)


def spec_of(case: Case) -> StoreSpec:
    """What `extract --no-attention` would plan."""
    sequence = state_bytes(case.dtype, CONTEXT, case.width) * case.states
    batch = BATCH_TOKENS // CONTEXT
    per_shard = min(LARGE_SHARD_BYTES // sequence, MOST_SHARD_SEQUENCES) // batch * batch
    return StoreSpec(
        identity={},
        layers=tuple(range(case.states)),
        attention_layers=(),
        context=CONTEXT,
        width=case.width,
        dtype=case.dtype,
        sequences_per_shard=per_shard,
        sequences={"train": math.ceil(case.tokens / CONTEXT), "validation": 0},
    )


def column(case: Case, options: argparse.Namespace) -> dict[str, str]:
    """The figures of one case."""
    spec = spec_of(case)
    sequences = spec.sequences["train"]
    shards = -(-sequences // spec.sequences_per_shard)
    stored = sequences * (state_bytes(case.dtype, CONTEXT, case.width) * case.states + 2 * 4 * CONTEXT)
    record = Record(spec.sequences_per_shard, 2**30, "0" * 32, "0" * 16)
    files = [array.file("train", shards) for array in spec.arrays.values()]
    journal = shards * sum(len(line_of({file: record})) for file in files)
    puts = shards * (math.ceil(stored / shards / PART_BYTES) + len(files) + 2)
    machines = case.gpus // PER_MACHINE
    compute = 2 * case.parameters * case.tokens / (case.gpus * options.tflops * 1e12 * options.utilisation)
    disk = stored / (machines * options.disk * 1e9)
    rent = max(compute, disk) / 3600 * case.gpus * options.gpu_hour
    storing = stored / 1e9 * options.gb_month
    return {
        "bytes": f"{stored / 1e12:.1f} TB",
        "shards": f"{shards:,}",
        "files": f"{shards * len(files):,}",
        "journal": f"{journal / 1e6:.0f} MB",
        "GPUs alone, hours": f"{compute / 3600:.2f}",
        f"disks alone ({options.disk:g} GB/s a machine), hours": f"{disk / 3600:.1f}",
        "requests to write it to a bucket": f"{puts / 1e6:.2f} million",
        "GPUs' rent while the slower of both runs": f"{rent:,.0f} $",
        "requests": f"{puts / 1000 * options.put_1000:,.0f} $",
        "a month in a bucket": f"{storing:,.0f} $",
        "tokens alone (`--tokens-only`)": f"{case.tokens * 8 / 1e9:.0f} GB",
    }


#: Passes of a layer for a token in `make paper`, by what makes them: a step back costs two passes forward.
PAPER = {
    "the teacher below h18, once for all runs": 18,
    "regression, both blocks": 2 * 3,
    "standard flow matching, both blocks": 2 * 3,
    "flow walking, midpoint, k = 3, both blocks": 2 * 3 * 6,
}


def paper_lines(options: argparse.Namespace) -> list[str]:
    """What `make paper` computes: Pythia-410M, six runs of 2.6e9 tokens in sequences of 2,048."""
    width, context, tokens = 1024, 2048, 2.6e9
    layer = 2 * 12 * width**2 + 4 * (context / 2) * width  # weights, and attention to half of the sequence
    lines = ["| `make paper` | GFLOP a token | GPU hours at a tenth of the peak |", "|---|---|---|"]
    for name, passes in (*PAPER.items(), ("in all", sum(PAPER.values()))):
        hours = passes * layer * tokens / (0.1 * options.tflops * 1e12) / 3600
        lines.append(f"| {name} | {passes * layer / 1e9:.2f} | {hours:.1f} |")
    return lines


def main() -> None:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=989, help="peak of a GPU in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of that peak")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s that a machine writes")
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="dollars")
    parser.add_argument("--put-1000", type=float, default=0.005, help="dollars for 1,000 puts")
    parser.add_argument("--gb-month", type=float, default=0.023, help="dollars")
    options = parser.parse_args()
    columns = [column(case, options) for case in CASES]
    print("| |" + "|".join(f" {case.name}, {case.gpus} GPUs " for case in CASES) + "|")
    print("|---" * (len(CASES) + 1) + "|")
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(each[row] for each in columns) + " |")
    print("\n" + "\n".join(paper_lines(options)))
    print("\nAssumed: " + ", ".join(f"{name} {value:g}" for name, value in vars(options).items()) + ".")


if __name__ == "__main__":
    main()
