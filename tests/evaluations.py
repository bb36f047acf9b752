"""Short runs and the rows of their scores, for the tests of evaluation."""

from pathlib import Path
from typing import Any

from conftest import CONTEXT

from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings

#: What `evaluate` promises of each row.
ROW = {
    *(
        "method",
        "block",
        "objective",
        "solver",
        "k",
        "nfe",
        "kl_latent",
        "nmse",
        "nmse_without_first",
        "kl",
        "ppl",
        "ppl_ratio",
        "shape",
        "layers",
        "bytes",
        "agreement",
    ),
    *("parameters", "ms_per_token", "run", "seed", "train_tokens", "weights_digest"),
}


def trained(store: Path, run: Path, **changes: Any) -> str:
    """The folder of a run of one step for layers 1 and 2."""
    settings = {
        "tokens": 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "compute_dtype": "float32",
        "block": "1:3",
    }
    return train(TrainSettings(**{"store": store, "run": str(run), **settings, **changes}))["run"]


def row_of(result: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The only row that says so."""
    (row,) = (row for row in result["rows"] if all(row[key] == value for key, value in given.items()))
    return row
