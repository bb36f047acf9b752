"""Content of the files that a report is made of, small and random."""

from typing import Any

import numpy as np


def a_map(size: int, tokens: int = 32, **changes: Any) -> dict[str, Any]:
    """A `recoupling.json` of so many states."""
    rng = np.random.default_rng(size)
    layers = list(range(size))
    square = [[float(rng.uniform()) if m < n else None for n in layers] for m in layers]
    partners = [[rng.permutation(tokens).tolist() if m < n else None for n in layers] for m in layers]
    figures = ("ratio", "ratio_raw", "transport_cost", "identity_cost", "random_cost", "relative_gap")
    return {
        "layers": layers,
        **dict.fromkeys((*figures, "ratio_stderr", "relative_displacement"), square),
        "partners": partners,
        "teacher": "tiny",
        "approximate": False,
        "settings": {
            "batches": 2,
            "tokens": tokens,
            "metric": "euclidean",
            "standardise": True,
            "skip_first": True,
        },
        "store_fingerprint": "f" * 32,
        **changes,
    }


def a_row(method: str, **values: Any) -> dict[str, Any]:
    """A row of `results.json`."""
    empty = dict.fromkeys(
        ("block", "objective", "solver", "k", "kl_latent", "nmse", "nmse_without_first", "kl", "run", "seed")
    )
    fixed = {
        "method": method,
        "nfe": 0,
        "ppl": 20.0,
        "parameters": 1000,
        "ms_per_token": 0.5,
        "train_tokens": 64,
    }
    return empty | fixed | values


def results(*, seeds: int = 2, run: str = "walk", teacher: str = "tiny") -> dict[str, Any]:
    """A `results.json` with the teacher, a skipped block, and a run of two numbers of steps for each seed."""
    rows = [
        a_row("teacher", nfe=None),
        a_row("skip layers 1-2", block="1:3", kl=1.5, nmse=0.9, kl_latent=0.8),
    ]
    for seed in range(seeds):
        for k in (1, 3):
            kl = 0.3 / k + 0.02 * seed
            rows.append(
                a_row(
                    *("fw",),
                    **{"run": f"{run}-seed{seed}", "seed": seed, "block": "1:3", "k": k, "nfe": 2 * k},
                    **{"solver": "midpoint", "objective": "fw", "parameters": 800, "kl": kl, "nmse": kl / 2},
                    **{"nmse_without_first": kl / 2, "kl_latent": kl / 3, "ppl": 20 + kl},
                )
            )
    return {
        "teacher": teacher,
        "store_fingerprint": "f" * 32,
        "validation_tokens": 4096,
        "compute_dtype": "float32",
        "rows": rows,
    }
