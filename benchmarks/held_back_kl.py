"""KL of runs on the training sequences that they held back: what recipes are chosen by, never on validation.

python benchmarks/held_back_kl.py STORE RUN... --hold-back 0.04 --sequences 32
python benchmarks/held_back_kl.py STORE RUN RUN --together
"""

import argparse
import math
from itertools import chain
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.base.workspace import find_runs
from lftpipe.config.settings.base import default_workspace
from lftpipe.data.batches import BatchFields, BatchReader
from lftpipe.evaluation.predictors import Block, Predictor, joined_predictors, run_predictors
from lftpipe.flow.distillation import full_divergence
from lftpipe.store import Store
from lftpipe.teacher.source import open_recorded, record_of
from lftpipe.teacher.tail import Tail


@torch.inference_mode()
def main() -> None:
    """Print a line for each run and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--hold-back", type=float, default=0.04, help="as the runs were trained")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--together", action="store_true", help="one line for the student of all runs")
    given = parser.parse_args()
    store = Store.open(given.store)
    teacher = open_recorded(record_of(store.identity), default_workspace(), store.path)
    reader, total = BatchReader(store, teacher, "cpu"), store.num_sequences("train")
    first = total - math.ceil(given.hold_back * total)
    held = range(first, min(total, first + given.sequences))
    students = [[run] for run in runs.open_runs(find_runs(store.path, tuple(given.runs)))]
    if given.together:
        students = [sorted(chain.from_iterable(students), key=lambda run: run.block)]
    steps, scored = tuple(given.k), list[Predictor]()
    for student in students:
        runs.refuse_healed(student)
        each = [run_predictors(run, steps, teacher, "cpu", stored=store.layers) for run in student]
        scored += each[0] if len(student) == 1 else joined_predictors(student, each, teacher, "cpu")
    for one in scored:
        assert one.block is not None
        assert one.origin is not None
        nfe = one.steps.nfe if one.steps else 0
        kl = _divergence(one, one.block, reader, held, Tail(teacher, one.block[1]))
        print(f"{one.origin.run} NFE {nfe} parameters {one.parameters:,} KL {kl:.4f}", flush=True)


def _divergence(one: Predictor, block: Block, reader: BatchReader, held: range, tail: Tail) -> float:
    """Mean KL of a student on sequences of the training split."""
    m, n = block
    own, total = one.tail or tail, 0.0
    whole = {0} & set(reader.store.layers) if one.enter else set()  # a healed student begins there
    for start in range(held.start, held.stop, 8):
        part = range(start, min(start + 8, held.stop))
        batch = reader.read("train", part, BatchFields(tuple(sorted({m, n, *whole}))))
        x_0 = batch.states[m] if one.enter is None else one.enter(batch)
        student = own(one.predict(x_0, batch.context), batch.context, start=n)
        reference = tail(batch.states[n], batch.context, start=n)
        total += full_divergence(reference, student).item() * len(part)
    return total / len(held)


if __name__ == "__main__":
    main()
