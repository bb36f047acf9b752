"""What `--dtype int8` costs a flow layer: trained alike from a float16 and an int8 store of the same tokens.

    python benchmarks/int8_kl.py [--model pythia-tiny] [--block 4:8] [--tokens 100000] [--train-tokens 400000]

Extracts the same tokens twice, trains the same layer (regression by default; same seed, same batches) from
each store, and scores both over the validation states of the float16 store, against the same reference.
Prints the KL, NMSE and perplexity of both, the ratio of int8 to float16, and what `lftpipe evaluate` says
of the int8 run on its own store, whose states are coded too. Everything is made in a temporary workspace.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.extract import extract
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, ExtractSettings, TrainSettings
from lftpipe.config.settings.base import default_workspace
from lftpipe.evaluation.predictors import run_predictors
from lftpipe.evaluation.scoring import ValidationSplit, score
from lftpipe.results.scores import Score
from lftpipe.runs import open_run
from lftpipe.store import Store
from lftpipe.teacher.source import open_recorded

DTYPES = ("float16", "int8")
FIGURES = ("kl", "nmse", "nmse_without_first", "ppl")


def trained(options: argparse.Namespace, folder: Path, dtype: Any) -> tuple[Path, Path, int]:
    """A store of this dtype, the run trained from it, and the bytes of its states."""
    shared: dict[str, Any] = {
        "workspace": options.workspace,
        "store": folder / dtype / "states.zarr",
        "threads": options.threads,
    }
    made = extract(
        ExtractSettings(
            **shared,
            model=options.model,
            corpus=options.corpus,
            context=options.context,
            tokens=options.tokens,
            validation_tokens=options.validation_tokens,
            layers=options.block.replace(":", ","),
            attention=False,
            dtype=dtype,
        )
    )
    run = folder / dtype / "run"
    train(
        TrainSettings(
            **shared,
            seed=options.seed,
            block=options.block,
            objective=options.objective,
            walk_steps=options.k,
            solver="euler",
            tokens=options.train_tokens,
            batch_tokens=options.batch_tokens,
            optimizer="adamw",
            learning_rate=1e-3,
            run=str(run),
        )
    )
    return shared["store"], run, made["bytes"]


def rows_of(runs: list[Path], store_path: Path, options: argparse.Namespace) -> list[Score]:
    """Both runs over the validation states of one store."""
    store = Store.open(store_path)
    teacher = open_recorded(store.identity["teacher"], options.workspace, store.path)
    predictors = [one for run in runs for one in run_predictors(open_run(run), (options.k,), teacher, "cpu")]
    split = ValidationSplit(store, teacher, "cpu", 2048)
    return score(predictors, split, teacher, compute_dtype="float32", device="cpu").rows


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="where GGUF teachers are")
    parser.add_argument("--corpus", default="python-stdlib")
    parser.add_argument("--block", default="4:8")
    parser.add_argument("--objective", default="regression")
    parser.add_argument("--k", type=int, default=1, help="steps of flow walking, in training and scoring")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--validation-tokens", type=int, default=20_000)
    parser.add_argument("--train-tokens", type=int, default=400_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go (default: temporary)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        stores, runs, sizes = zip(*(trained(options, folder, dtype) for dtype in DTYPES), strict=True)
        rows = [row.to_json() for row in rows_of(list(runs), stores[0], options)]
        own = evaluate(
            EvaluateSettings(
                workspace=options.workspace,
                store=stores[1],
                runs=(str(runs[1]),),
                k=(options.k,),
                skips=(),
                threads=options.threads,
            )
        )["rows"][-1]
    finally:
        shutil.rmtree(folder)
    print(
        f"{options.model} {options.block} {options.objective}, {options.train_tokens:,} training tokens of "
        f"{options.tokens:,}, seed {options.seed}; int8 store {sizes[1] / sizes[0]:.3f} of float16's bytes"
    )
    for key in FIGURES:
        first, second = (row[key] for row in rows)
        print(
            f"  {key:18} float16 {first:.6g}   int8 {second:.6g}   ratio {second / first:.4f}   "
            f"int8 on its own store {own[key]:.6g}"
        )
    if options.json:
        found = {"float16": rows[0], "int8": rows[1], "int8_own_store": own, "bytes": sizes}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
