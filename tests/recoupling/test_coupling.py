"""Laws of exact transport and of the recoupling ratio; POT and SciPy are the oracles."""

import numpy as np
import ot
import pytest
from cases import cases
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from lftpipe.config.settings import Metric
from lftpipe.recoupling.coupling import couple, couple_products, recoupled
from lftpipe.recoupling.point_clouds import (
    cost_matrix,
    directions,
    heavy_channels,
    make_cloud,
    standardised,
    tie_groups,
)

METRICS = ("euclidean", "sqeuclidean", "cosine")


def clouds(x_0, x_1, metric="euclidean"):
    groups = tie_groups(x_0), tie_groups(x_1)
    if metric == "cosine":
        x_0, x_1 = directions(x_0), directions(x_1)
    light = [x.astype(np.float32) for x in (x_0, x_1)]
    heavy = heavy_channels([abs(x).max(0) for x in light])
    return make_cloud(x_0, heavy, groups[0], light[0]), make_cloud(x_1, heavy, groups[1], light[1])


def coupling(x_0, x_1, metric: Metric = "euclidean"):
    return couple(*clouds(x_0, x_1, metric), metric)


def pair(seed, samples=48, features=40, step=2.0, dtype: type = np.float32):
    rng = np.random.default_rng(seed)
    x_0 = rng.normal(size=(samples, features)) * np.arange(1, features + 1) ** -0.5
    return x_0.astype(dtype), (x_0 + step * rng.normal(size=x_0.shape) / features**0.5).astype(dtype)


def with_massive_activations(seed, samples=96, features=128, peak=28_000.0):
    """Clouds with a few points out at `peak` in one channel, as real models have them."""
    x_0, x_1 = pair(seed, samples, features, step=1.5, dtype=np.float64)
    x_0, x_1 = 10 * x_0, 10 * x_1
    rng = np.random.default_rng(seed)
    sinks = rng.choice(samples, 6, replace=False)
    x_1[sinks, 7] += peak * (1 + 1e-3 * rng.normal(size=6))
    x_0[sinks[:4], 7] += peak * (1 + 1e-3 * rng.normal(size=4))
    return x_0.astype(np.float16), x_1.astype(np.float16)


def direct_credit(partner, groups_0, groups_1):
    """The rule in words: a partner with the same x_0 or the same x_1 is a match."""
    return 1 - np.mean((groups_0 == groups_0[partner]) | (groups_1 == groups_1[partner]))


@pytest.mark.parametrize("metric", METRICS)
def test_identical_clouds_are_not_recoupled(metric):
    x, _ = pair(0)
    result = coupling(x, x, metric)
    assert result.ratio == result.ratio_raw == 0
    assert result.transport_cost == result.identity_cost == 0


@pytest.mark.parametrize("metric", METRICS)
def test_the_costs_are_the_distances(metric):
    x_0, x_1 = pair(1)
    expected = cdist(x_0.astype(np.float64), x_1.astype(np.float64), metric)
    np.testing.assert_allclose(cost_matrix(*clouds(x_0, x_1, metric), metric), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_a_joint_permutation_leaves_the_ratio_alone(seed):
    x_0, x_1 = pair(seed, step=4.0)
    x_0[:20] = x_0[20:40]  # ties do not spoil it
    order = np.random.default_rng(seed).permutation(len(x_0))
    before, after = coupling(x_0, x_1), coupling(x_0[order], x_1[order])
    assert 0 < before.ratio < before.ratio_raw
    assert (after.ratio, after.ratio_raw) == pytest.approx((before.ratio, before.ratio_raw))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [2.0**-10, 3.0, 1000.0])
def test_the_ratio_does_not_depend_on_the_scale(metric, scale):
    x_0, x_1 = pair(3, step=4.0)
    assert coupling(scale * x_0, scale * x_1, metric).ratio == coupling(x_0, x_1, metric).ratio


def test_a_common_shift_moves_nothing():
    x_0, x_1 = pair(4, step=4.0, dtype=np.float64)
    shift = np.full(x_0.shape[1], 300.0)
    near, far = coupling(x_0, x_1), coupling((x_0 + shift).astype(np.float64), x_1 + shift)
    assert far.ratio == near.ratio > 0
    assert far.transport_cost == pytest.approx(near.transport_cost, rel=1e-4)


def test_swapping_the_clouds_leaves_the_ratio_alone():
    x_0, x_1 = pair(5, step=4.0)
    assert coupling(x_0, x_1).ratio == coupling(x_1, x_0).ratio > 0


def test_random_pairing_keeps_about_one_pair():
    """The number of fixed points of a random permutation has mean 1 and variance 1."""
    rng = np.random.default_rng(0)
    kept = []
    for seed in range(60):
        x_0, _ = pair(seed, samples=40)
        kept.append(40 * (1 - coupling(x_0, x_0[rng.permutation(40)]).ratio))
    assert np.mean(kept) == pytest.approx(1, abs=4 / np.sqrt(60))


def test_all_points_alike_match_anyone():
    _, x_1 = pair(6)
    result = coupling(np.zeros_like(x_1), x_1)
    assert result.ratio == 0
    assert result.ratio_raw == pytest.approx(1 - 1 / len(x_1))


@pytest.mark.parametrize("seed", range(cases(20, most=250)))
def test_equals_pot_and_scipy_also_with_ties(seed):
    """Costs and ratios agree, though ties let the solvers return other permutations.

    From two dimensions on: on a line the optimum is not unique even without ties.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 60))
    x_0, x_1 = pair(seed, count, int(rng.integers(2, 40)), step=float(rng.choice([0.3, 2.0, 6.0])))
    if seed % 5:
        side = x_0 if seed % 2 else x_1
        side[:] = side[rng.integers(0, max(1, count // int(rng.integers(1, 5))), count)]
    result = coupling(x_0, x_1)
    cost = cdist(x_0.astype(np.float64), x_1.astype(np.float64))
    plan = ot.emd(np.full(count, 1 / count), np.full(count, 1 / count), cost)
    groups = tie_groups(x_0), tie_groups(x_1)
    for partner in (plan.argmax(1), linear_sum_assignment(cost)[1]):
        assert cost[np.arange(count), result.partner].sum() == pytest.approx(
            cost[np.arange(count), partner].sum(), rel=1e-12
        )
        assert result.ratio == pytest.approx(direct_credit(partner, *groups))
        assert (result.ratio, result.ratio_raw) == pytest.approx(recoupled(partner, *groups))
    if len(set(groups[0])) == len(set(groups[1])) == count:
        assert result.ratio == result.ratio_raw == pytest.approx(1 - np.trace(plan))


@pytest.mark.parametrize("seed", range(cases(4, most=40)))
def test_float32_products_give_the_ratio_of_float64_with_massive_activations(seed):
    x_0, x_1 = with_massive_activations(seed)
    exact = cdist(x_0.astype(np.float64), x_1.astype(np.float64))
    count = np.arange(len(exact))
    expected = linear_sum_assignment(exact)[1]
    result = coupling(x_0, x_1)
    assert result.ratio == 1 - np.mean(expected == count)
    assert exact[count, result.partner].sum() == pytest.approx(exact[count, expected].sum(), rel=1e-13)
    np.testing.assert_allclose(cost_matrix(*clouds(x_0, x_1), "euclidean"), exact, rtol=1e-5)


def test_massive_activations_do_need_that_care():
    """The plain float32 formula is off by tens of per cent between two massive points."""
    x_0, x_1 = (x.astype(np.float32) for x in with_massive_activations(1))
    plain = (x_0**2).sum(1)[:, None] + (x_1**2).sum(1) - 2 * x_0 @ x_1.T
    exact = cdist(x_0.astype(np.float64), x_1.astype(np.float64))
    assert np.max(np.abs(np.sqrt(np.maximum(plain, 0)) / exact - 1)) > 0.01


def test_a_shared_offset_in_every_channel_is_done_in_float64():
    """Cancellation that no few channels explain: the distances are 1e-4 of the norms."""
    x_0, x_1 = pair(7, 64, 64, step=1.0, dtype=np.float64)
    x_0, x_1 = (1000 + x_0).astype(np.float32), (1000 + x_1).astype(np.float32)
    exact = cdist(x_0.astype(np.float64), x_1.astype(np.float64))
    np.testing.assert_allclose(cost_matrix(*clouds(x_0, x_1), "euclidean"), exact, rtol=1e-5)


@pytest.mark.parametrize("features", [8, 64])
def test_near_points_of_other_pairs_keep_their_distances(features):
    """A few entries off the diagonal cancel in the product: they are done by differences."""
    x_0, x_1 = pair(10, 64, features, step=3.0)
    x_1[:5] = x_0[20:25] * np.float32(1 + 1e-4)
    x_1[5] = x_0[25]
    exact = cdist(x_0.astype(np.float64), x_1.astype(np.float64))
    np.testing.assert_allclose(cost_matrix(*clouds(x_0, x_1), "euclidean"), exact, rtol=1e-5, atol=1e-6)


def test_several_clouds_at_once_are_coupled_as_one_by_one():
    x_0, x_1 = clouds(*pair(11, step=4.0))
    x_2, _ = clouds(*pair(12))
    products = np.stack([x.light @ x_1.light.T for x in (x_0, x_2)])
    together = couple_products([x_0, x_2], x_1, "euclidean", products)
    for result, alone in zip(
        together, (couple(x_0, x_1, "euclidean"), couple(x_2, x_1, "euclidean")), strict=True
    ):
        assert (result.partner == alone.partner).all()
        assert result.transport_cost == pytest.approx(alone.transport_cost, rel=1e-6)


def test_ties_are_identical_points_whatever_the_sign_of_zero():
    points = np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0], [0.0, 1.0]], np.float16)
    groups = tie_groups(points)
    assert groups[0] == groups[1] == groups[3] != groups[2]


def test_standardised_channels_have_unit_spread_and_constant_ones_vanish():
    x, _ = pair(8)
    x[:, 3] = 5
    result = standardised(1e4 * x)
    np.testing.assert_allclose(result.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.delete(result.std(0), 3), 1)
    assert (result[:, 3] == 0).all()
    np.testing.assert_allclose(result, standardised(x), atol=1e-6)


def test_a_zero_point_has_no_direction_and_no_nan():
    x_0, x_1 = pair(9)
    x_0[0] = 0
    cost = cost_matrix(*clouds(x_0, x_1, "cosine"), "cosine")
    np.testing.assert_allclose(cost[0], 0.5, rtol=1e-6)
