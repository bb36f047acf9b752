"""Intervals cover what they promise, differences are paired, and corrected p-values are Holm's."""

import numpy as np
import pytest

from lftpipe.evaluation.statistics import difference, holm, interval_of, of_means, resampled


def test_nineteen_of_twenty_intervals_cover_the_true_figure():
    rng, covered, times = np.random.default_rng(0), 0, 200
    for _ in range(times):
        tokens = rng.integers(20, 200, 60).astype(float)
        nats = tokens * (2.0 + 0.5 * rng.standard_normal(60))
        low, high = interval_of(resampled([(nats, tokens)])) or (0, 0)
        covered += low < 2.0 < high
    assert 0.9 * times <= covered <= 0.99 * times


def test_an_interval_of_a_mean_over_tasks_is_as_wide_as_its_standard_error_says():
    rng = np.random.default_rng(1)
    tasks = [of_means((rng.random(count) < 0.6).astype(float).tolist()) for count in (100, 400)]
    low, high = interval_of(resampled(tasks)) or (0, 0)
    error = np.sqrt(sum(scores.var() / len(scores) for scores, _ in tasks)) / 2
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(np.mean([scores.mean() for scores, _ in tasks]), abs=0.01)


def test_the_same_documents_are_drawn_for_every_model():
    """So the ratio of two models that differ by a factor has no spread at all."""
    scores = np.random.default_rng(2).random(50)
    whole, half = resampled([of_means(scores.tolist())]), resampled([of_means((scores / 2).tolist())])
    assert whole is not None
    assert half is not None
    assert half / whole == pytest.approx(0.5)


def test_few_documents_have_no_interval():
    assert resampled([of_means([0.0, 1.0] * 4)]) is None
    assert resampled([of_means([0.0, 1.0] * 40), of_means([1.0])]) is None
    assert interval_of(np.array([1.0, np.inf])) is None


def test_a_difference_on_the_same_documents_is_found_where_the_documents_differ_far_more():
    rng = np.random.default_rng(3)
    hard, tokens = 10 * rng.random(40), np.full(40, 100.0)
    better, worse = hard + 0.01 * rng.standard_normal(40), hard + 0.05 + 0.01 * rng.standard_normal(40)
    found = difference([((better - worse) * tokens, tokens)])
    assert found.value == pytest.approx(-0.05, abs=0.01)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1] < 0
    assert found.p < 0.01
    none = difference([((better - rng.permutation(better)) * tokens, tokens)])
    assert none.interval is not None
    assert none.interval[0] < 0 < none.interval[1]
    assert none.p > 0.05


@pytest.mark.parametrize(("count", "p"), [(1, 1.0), (2, 0.5)])
def test_a_difference_on_few_documents_is_no_evidence(count, p):
    found = difference([(np.full(count, -3.0), np.full(count, 10.0))])
    assert found.value == pytest.approx(-0.3)
    assert (found.interval, found.p) == (None, p)


def test_holms_correction_is_that_of_his_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
