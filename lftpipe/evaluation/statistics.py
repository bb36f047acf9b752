"""How sure a figure is: bootstrap intervals over documents, paired differences, Holm's correction. No torch.

A figure is the mean over strata (one text; or tasks) of a ratio of sums over documents, such as nats over
tokens. Figures of several models are of the same documents in the same order; every interval draws them
alike, so differences are paired.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Resamples of a bootstrap and of a test, and their seed.
RESAMPLES, SEED = 2000, 0

#: Fewer documents give no interval: a bootstrap over them would promise too much.
LEAST_DOCUMENTS = 10

Stratum = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, document by document."""

Interval = tuple[float, float]


class Difference(NamedTuple):
    """Between two models on the same documents."""

    value: float
    interval: Interval | None
    p: float
    """Of a sign-flip test that it is zero."""


def of_means(scores: Sequence[float]) -> Stratum:
    """Of a mean over documents that count the same."""
    return np.asarray(scores, float), np.ones(len(scores))


def resampled(strata: Sequence[Stratum]) -> np.ndarray | None:
    """The figure on documents drawn again and again with replacement; None if they are too few."""
    if min((len(numerators) for numerators, _ in strata), default=0) < LEAST_DOCUMENTS:
        return None
    figures = []
    for stratum in strata:
        drawn = stats.bootstrap(
            stratum,
            _ratio,
            n_resamples=RESAMPLES,
            batch=max(1, 2**22 // len(stratum[0])),
            vectorized=True,
            paired=True,
            method="percentile",
            rng=SEED,
        )
        figures.append(drawn.bootstrap_distribution)
    return np.mean(figures, axis=0)


def _ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1) -> np.ndarray:
    return numerators.sum(axis) / denominators.sum(axis)


def interval_of(figures: np.ndarray | None) -> Interval | None:
    """The middle 95 % of resampled figures; None where there are none, or one is not finite."""
    if figures is None or not np.isfinite(figures).all():
        return None
    low, high = np.quantile(figures, (0.025, 0.975)).tolist()
    return low, high


def difference(strata: Sequence[Stratum]) -> Difference:
    """Of strata whose numerators are differences between two models."""
    parts = [numerators / denominators.sum() / len(strata) for numerators, denominators in strata]
    whole = np.concatenate(parts)
    if len(whole) < 2:  # either sign of a single document is as likely; scipy refuses it
        return Difference(float(whole.sum()), None, 1.0)
    test = stats.permutation_test(
        (whole,),
        lambda values, axis: values.sum(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(whole)),
        vectorized=True,
        rng=SEED,
    )
    return Difference(float(whole.sum()), interval_of(resampled(strata)), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value after Holm's correction for all of them."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
