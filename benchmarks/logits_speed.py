"""What the term `logits` costs, forward and backward through a frozen tail, and a states step beside it.

    python benchmarks/logits_speed.py --teacher data/smollm2-135m/teacher --block 12:20 [--sequences 1]
    python benchmarks/logits_speed.py ... --store STORE

Random states stand for the teacher's, or validation sequences of a store; the student's are three tenths
off: noise, or the way back to the block's start. Processor seconds of one thread, the best of the rounds, and
the terms' values (give `--compute-dtype float32` for these), of which the sampled one has another sample in
every round. The first line is the term as it was before: sequence by sequence, with the tail run for the
teacher too.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lftpipe.base.device import autocast, cast_linear, dtype_name, resolve_compute_dtype
from lftpipe.config.layers import parse_block
from lftpipe.config.settings.base import default_workspace
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.flow.distillation import full_divergence
from lftpipe.store import Store
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail, TopLogits
from lftpipe.training.terms import logit_divergence, sampled_logit_divergence, top_logit_divergence


def main() -> None:
    """Time the ways in turn and print them."""
    options = given()
    torch.set_num_threads(1)
    teacher = open_teacher(options.teacher, options.workspace)
    m, n = parse_block(options.block, teacher.num_layers)
    tail, layer = Tail(teacher, n), load_layer(teacher, m).requires_grad_(True)
    dtype = resolve_compute_dtype(options.compute_dtype, "cpu")
    cast_linear(tail, dtype)
    batch, start = states_of(options, teacher, m, n)
    x = batch.states[n]
    computing = autocast("cpu", dtype)
    with torch.no_grad(), computing:
        last = tail.states(x, batch.context, start=n, stop=teacher.num_layers)
        logits = tail.head(tail.norm(last))
        values, ids = logits.topk(64)
        top = TopLogits(values, ids.int(), logits.logsumexp(-1))
    stored = replace(batch, states={n: x, teacher.num_layers: last}, logits=top)
    end = (x + 0.3 * (start - x)).requires_grad_()

    def before() -> Tensor:
        losses = []
        for row in range(len(x)):
            part = batch.context.rows(slice(row, row + 1))
            with torch.no_grad():
                target = tail(x[row : row + 1], part, start=n)
            losses.append(full_divergence(target, tail(end[row : row + 1], part, start=n)))
        return torch.stack(losses).mean()

    def another() -> Batch:
        return replace(stored, step=len(found["states"]))  # a step draws a sample of its own

    def on(term: Callable[..., Tensor], seen: Batch) -> Tensor:
        return term(tail, tail.head_input(end, seen.context), seen)

    ways: dict[str, Callable[[], Tensor]] = {
        "logits, as they were": before,
        "logits, without the last states": lambda: on(logit_divergence, batch),
        "logits": lambda: on(logit_divergence, stored),
        "top-logits": lambda: on(top_logit_divergence, stored),
        "sampled-logits": lambda: on(sampled_logit_divergence, another()),
        "states": lambda: (layer(x, batch.context) - x).square().mean(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began = time.process_time()
            with computing:
                loss = way()
            loss.backward()
            seconds[name].append(time.process_time() - began)
            found[name].append(loss.item())
    print(f"computed in {dtype_name(dtype)}")
    for name, taken in seconds.items():
        mean = sum(found[name]) / len(found[name])
        print(
            f"  {name:34}{min(taken):7.2f} s   {mean:.5f} ({min(found[name]):.5f} to {max(found[name]):.5f})"
        )


def given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="name or folder")
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="with the teacher")
    parser.add_argument("--block", required=True)
    parser.add_argument("--store", type=Path, help="of the teacher, with both of the block's states")
    parser.add_argument("--sequences", type=int, default=1, help="of 512 tokens, or of the store")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args()


def states_of(options: argparse.Namespace, teacher: Teacher, m: int, n: int) -> tuple[Batch, Tensor]:
    """A batch with the block's end, and what lies away from it: the block's start, or noise."""
    if options.store is None:
        places = torch.arange(512).expand(options.sequences, -1)
        x = torch.randn(options.sequences, 512, teacher.width)
        batch = Batch(0, places, places, {n: x}, rotary=load_rotary(teacher))
        return batch, x + torch.randn_like(x)
    reader = BatchReader(Store.open(options.store), teacher, "cpu")
    batch = reader.read("validation", range(options.sequences), BatchFields((m, n)))
    return replace(batch, states={n: batch.states[n]}), batch.states[m]


if __name__ == "__main__":
    main()
