"""Assignments are optimal, whichever solver is installed; SciPy without our start is the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from lftpipe.recoupling import coupling
from lftpipe.recoupling.coupling import assign, solver


def total(cost, partner):
    assert sorted(partner) == list(range(len(cost)))
    return cost[np.arange(len(cost)), partner].sum()


@pytest.fixture(params=["lapx", "scipy"], autouse=True, scope="module")
def solved_by(request):
    """Every test with the solver that is installed, and with SciPy alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "scipy":
            patch.setattr(coupling, "lapjvx", None)
        elif coupling.lapjvx is None:
            pytest.skip("lapx is not installed")
        yield request.param


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_any_cost_is_assigned_optimally(count, seed):
    """Small whole costs, so that equal costs abound."""
    cost = np.random.default_rng(seed).integers(0, 5, (count, count)).astype(np.float64)
    assert total(cost, assign(cost)) == cost[linear_sum_assignment(cost)].sum()


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e9, 1e200])
@pytest.mark.parametrize("count", [2, 40, 150])
def test_the_size_of_costs_does_not_matter(count, scale):
    cost = scale * np.random.default_rng(count).random((count, count))
    expected = cost[linear_sum_assignment(cost)].sum()
    assert total(cost, assign(cost)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9])
def test_a_few_points_far_away_do_not_spoil_the_others(far):
    """Massive activations: whole rows and columns are larger than the rest by orders of magnitude."""
    rng = np.random.default_rng(0)
    cost = rng.random((80, 80))
    cost[:3] += far
    cost[:, 5:9] += far
    partner = assign(cost)
    rest = np.setdiff1d(np.arange(80), [0, 1, 2])
    near = rest[~np.isin(partner[rest], range(5, 9))]
    inner = cost[np.ix_(near, partner[near])]
    assert inner.trace() == pytest.approx(inner[linear_sum_assignment(inner)].sum(), rel=1e-6)
    assert total(cost, partner) == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-14)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_constant_costs_and_none_at_all_keep_the_identity(count):
    for cost in (np.zeros((count, count)), np.full((count, count), 3.0)):
        assert (assign(cost) == np.arange(count)).all()


def test_a_permutation_that_is_strictly_best_is_found():
    order = np.random.default_rng(1).permutation(60)
    cost = np.ones((60, 60))
    cost[np.arange(60), order] = 0
    assert (assign(cost) == order).all()


def test_the_costs_are_left_as_they_were():
    cost = np.random.default_rng(2).random((20, 20))
    before = cost.copy()
    assign(cost)
    assert (cost == before).all()


def test_the_solver_is_named_with_its_version(solved_by):
    name, version = solver().split()
    assert name == solved_by
    assert version[0].isdigit()
