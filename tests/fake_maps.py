"""Recoupling maps that no store was read for."""

from typing import Any

import numpy as np

from lftpipe.results.recoupling import FIGURES, RecouplingMap


def upper(size: int, value: Any) -> list[list[Any]]:
    """A square with `value(m, n)` above the diagonal, else None."""
    return [[value(m, n) if m < n else None for n in range(size)] for m in range(size)]


def make_map(layers: int | list[int], tokens: int = 32, **changes: Any) -> RecouplingMap:
    """Random figures, the same for a size; `ratio={(0, 2): 0.5}` gives numbers, and 0 to all other pairs.

    Parameters
    ----------
    layers
        The states on the map, or how many there are from 0 on.
    tokens
        Of a plan.
    changes
        Other fields.
    """
    layers = list(range(layers)) if isinstance(layers, int) else layers
    size = len(layers)
    rng = np.random.default_rng(size)
    square = upper(size, lambda m, n: float(rng.uniform()))
    for name, given in changes.items():
        if name in (*FIGURES, "influence", "probe_residual") and isinstance(given, dict):
            changes[name] = upper(size, lambda m, n, given=given: float(given.get((layers[m], layers[n]), 0)))
    fields: dict[str, Any] = {
        "layers": layers,
        **dict.fromkeys((*FIGURES, "influence"), square),
        "partners": upper(size, lambda m, n: rng.permutation(tokens).tolist()),
        "samples": [[[0, token] for token in range(tokens)]],
        "teacher": "tiny",
        "num_layers": layers[-1],
        "approximate": False,
        "solver": "lapx",
        "lftpipe": "0.1.0",
        "settings": {
            "batches": 2,
            "tokens": tokens,
            "metric": "euclidean",
            "standardise": True,
            "skip_first": True,
            "rank_by": "ratio",
        },
        "store_fingerprint": "f" * 32,
        "ranking": [],
    }
    return RecouplingMap(**fields | changes)
