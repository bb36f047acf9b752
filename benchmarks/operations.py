"""How many operations a training step dispatches, and how often it would wait for a GPU. No GPU is needed.

    python benchmarks/operations.py [--model pythia-tiny] [--block 5:8] [--objectives fw,sfm,distil]

Counted by torch's dispatcher on the processor, in float32, in the second step of a run. On a GPU each
operation is one kernel to launch, or more; views are not counted. What waits is what asks a tensor for a
value, or for a size that depends on values. `tests/training/test_without_waiting.py` holds that no step of
any objective does.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lftpipe.commands.extract import extract
from lftpipe.config.layers import parse_block
from lftpipe.config.settings import ExtractSettings, TrainSettings
from lftpipe.config.settings.base import default_workspace
from lftpipe.store import Store
from lftpipe.teacher.source import open_recorded, record_of
from lftpipe.training import TrainingRun
from lftpipe.training.step import Run, take_step
from lftpipe.training.validate import resolved

#: What asks for a value, or for a size that depends on values.
WAITING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}

#: What makes a tensor without writing to it.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Dispatched(TorchDispatchMode):
    """Counts operations by name, and lists those that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        name = func.overloadpacket.__name__
        aliases = [each.alias_info for each in func._schema.returns]
        if name not in UNWRITTEN and not any(each and not each.is_write for each in aliases):
            self.operations[name] += 1
        if name in WAITING or (name in ("index", "index_put", "index_put_") and _by_mask(args[1])):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _by_mask(indices: list[Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def step_of(run: Run) -> Dispatched:
    """What the second step of a run dispatches; the first makes the optimiser's state."""
    batches = run.reader.shuffled(run.fields, run.order, 0)
    take_step(run, next(batches), look=False)
    batch = next(batches)
    _ = batch.context  # made on the processor, from position ids that are there: it waits for no GPU
    with Dispatched() as counted:
        take_step(run, batch, look=False)
    return counted


def main() -> None:
    """Read the options, run, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--block", default="5:8")
    parser.add_argument("--objectives", default="sfm,fw,regression,distil,trajectory")
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = extract(
            ExtractSettings(
                workspace=default_workspace(),
                model=options.model,
                corpus="python-stdlib",
                context=options.context,
                tokens=16 * options.context,
                validation_tokens=options.context,
                store=Path(folder) / "states.zarr",
                compute_dtype="float32",
            )
        )
        store = Store.open(Path(made["store"]))
        teacher = open_recorded(record_of(store.identity), default_workspace(), store.path)
        block = parse_block(options.block, teacher.num_layers)
        print(f"{teacher.name}, block {options.block}, float32")
        for objective in options.objectives.split(","):
            given = TrainSettings(
                store=store.path,
                objective=objective,
                batch_tokens=4 * options.context,
                compute_dtype="float32",
            )
            settings = resolved(given, store, [block], teacher)
            counted = step_of(TrainingRun(Path(folder) / objective, settings, store, teacher, [block]))
            most = ", ".join(f"{name} {count}" for name, count in counted.operations.most_common(6))
            total = counted.operations.total()
            print(f"{objective:12}{total:6,} operations, {len(counted.waits)} waits ({most})")


if __name__ == "__main__":
    main()
