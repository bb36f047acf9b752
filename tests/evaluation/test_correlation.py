"""Spearman's coefficient and its interval, held against SciPy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lftpipe.reporting.correlation import correlate, spearman

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12)


@given(POINTS)
def test_the_coefficient_is_scipys_with_ties(points):
    x, y = np.array(points, float).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(spearman(x, y))
        assert correlate(x, y, 0) == {"points": len(x), "spearman": None, "low": None, "high": None}
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)


def test_only_the_order_counts():
    x = np.array([0.1, 3.0, 2.0, 9.0])
    assert spearman(x, np.exp(x)) == 1
    assert spearman(x, -(x**3)) == -1


def test_the_interval_is_scipys_percentile_bootstrap():
    rng = np.random.default_rng(3)
    x = rng.normal(size=14)
    y = x + rng.normal(size=14)
    found = correlate(x, y, seed=0)
    theirs = stats.bootstrap(
        (x, y),
        lambda x, y: stats.spearmanr(x, y)[0],
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=0,
    ).confidence_interval
    # Two seeds of 2,000 and 10,000 resamples: their ends differ by about 0.02.
    assert found["low"] == pytest.approx(theirs.low, abs=0.06)
    assert found["high"] == pytest.approx(theirs.high, abs=0.03)
    assert found["low"] < found["spearman"] < found["high"]


def test_a_seed_gives_the_same_interval():
    x, y = np.random.default_rng(1).normal(size=(2, 9))
    assert correlate(x, y, seed=4) == correlate(x, y, seed=4) != correlate(x, y, seed=5)


def test_two_points_have_no_correlation():
    found = correlate(np.array([1.0, 2.0]), np.array([1.0, 2.0]), 0)
    assert found == {"points": 2, "spearman": None, "low": None, "high": None}
