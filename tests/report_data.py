"""A table of results that no run was scored for."""

from typing import Any

from lftpipe.results.scores import Results, Score


def results(*, seeds: int = 2, run: str = "walk", teacher: str = "tiny", **changes: Any) -> Results:
    """The teacher, a skipped block, and a run of two numbers of steps for each seed."""
    given = {"nfe": 0, "ppl": 20.0, "parameters": 1000, "ms_per_token": 0.5}
    rows = [
        Score(method="teacher", **given | {"nfe": None}),
        Score(method="skip layers 1-2", block="1:3", kl=1.5, nmse=0.9, kl_latent=0.8, **given),
    ]
    for seed in range(seeds):
        for k in (1, 3):
            kl = 0.3 / k + 0.02 * seed
            rows.append(
                Score(
                    **{"method": "fw", "run": f"{run}-seed{seed}", "seed": seed, "block": "1:3", "k": k},
                    **{"nfe": 2 * k, "solver": "midpoint", "objective": "fw", "parameters": 800},
                    **{"kl": kl, "nmse": kl / 2, "nmse_without_first": kl / 2, "kl_latent": kl / 3},
                    **{"ppl": 20 + kl, "ms_per_token": 0.4, "train_tokens": 64},
                )
            )
    fields: dict[str, Any] = {
        "teacher": teacher,
        "store": "data/tiny/states.zarr",
        "store_fingerprint": "f" * 32,
        "validation_tokens": 4096,
        "compute_dtype": "float32",
        "settings": {},
        "rows": rows,
    }
    return Results(**fields | changes)
