"""KL of runs on the training sequences that they held back: what recipes are chosen by, never on validation.

python benchmarks/held_back_kl.py STORE RUN... --hold-back 0.04 --sequences 32
"""

import argparse
import math
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.batch import BatchFields, BatchReader
from lftpipe.config.settings.base import default_workspace
from lftpipe.evaluation.predictors import run_predictors
from lftpipe.flow.distillation import full_divergence
from lftpipe.store import Store
from lftpipe.teacher.recorded import open_recorded, record_of
from lftpipe.teacher.tail import Tail
from lftpipe.workspace import find_runs


@torch.inference_mode()
def main() -> None:
    """Print a line for each run and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--hold-back", type=float, default=0.04, help="as the runs were trained")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3])
    given = parser.parse_args()
    store = Store.open(given.store)
    teacher = open_recorded(record_of(store.identity), default_workspace(), store.path)
    reader, total = BatchReader(store, teacher, "cpu"), store.num_sequences("train")
    first = total - math.ceil(given.hold_back * total)
    held = range(first, min(total, first + given.sequences))
    for path in find_runs(store.path, tuple(given.runs)):
        run = runs.open_run(path)
        m, n = run.block
        tail = Tail(teacher, n)
        for one in run_predictors(run, tuple(given.k), teacher, "cpu", stored=store.layers):
            own, total_kl = one.tail or tail, 0.0
            whole = {0} & set(store.layers) if one.enter else set()  # a healed student begins there
            for start in range(held.start, held.stop, 8):
                part = range(start, min(start + 8, held.stop))
                batch = reader.read("train", part, BatchFields(tuple(sorted({m, n, *whole}))))
                x_0 = batch.states[m] if one.enter is None else one.enter(batch)
                student = own(one.predict(x_0, batch.context), batch.context, start=n)
                reference = tail(batch.states[n], batch.context, start=n)
                total_kl += full_divergence(reference, student).item() * len(part)
            nfe = one.steps.nfe if one.steps else 0
            print(
                f"{path.name} NFE {nfe} parameters {one.parameters:,} KL {total_kl / len(held):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
