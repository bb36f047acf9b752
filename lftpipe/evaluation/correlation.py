"""Rank correlation of a few pairs of numbers, and how sure one can be of it."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

RESAMPLES = 10_000
CONFIDENCE = 0.95

#: With fewer points a rank correlation says nothing.
FEWEST = 3


def spearman(
    x: Float[np.ndarray, "*resample point"], y: Float[np.ndarray, "*resample point"]
) -> Float[np.ndarray, "*resample"]:
    """Spearman's coefficient over the last axis; equal values share a rank. NaN where a side is constant."""
    middle = (x.shape[-1] + 1) / 2
    a, b = rankdata(x, axis=-1) - middle, rankdata(y, axis=-1) - middle
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)


def correlate(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], seed: int) -> dict[str, Any]:
    """Spearman's coefficient with its bootstrap interval, JSON-plain.

    Returns
    -------
    dict
        `points`, `spearman`, and the ends `low` and `high` of the percentile interval of `CONFIDENCE` over
        `RESAMPLES` seeded resamples of the pairs. Resamples in which one side is constant have no
        coefficient and are left out. All None with fewer than `FEWEST` points or a constant side.
    """
    found: dict[str, Any] = {"points": len(x), "spearman": None, "low": None, "high": None}
    if len(x) < FEWEST:
        return found
    coefficient = float(spearman(x, y))
    if np.isnan(coefficient):
        return found
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    values = spearman(x[drawn], y[drawn])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[~np.isnan(values)], [tail, 1 - tail])
    return found | {"spearman": coefficient, "low": float(low), "high": float(high)}
