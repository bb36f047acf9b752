"""Exact optimal transport between two paired clouds, and the recoupling ratio.

Source: Latent Flow Transformer (arXiv 2505.14513), section 3.2, equations 6-7. For `O` pairs with uniform
weights the optimal plan is a permutation, so that this is an assignment problem. The solver is SciPy's
shortest augmenting path in float64, warm-started; docs/recoupling.md says what was tried against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from scipy.optimize import linear_sum_assignment

from lftpipe.settings import Metric

#: Channels whose products are summed in float64. Massive activations sit in one or two; the rest is small.
HEAVY_CHANNELS = 16

#: A squared distance below this share of the largest squared norm has lost three digits to cancellation in a
#: float32 product: then the product is done in float64.
CANCELLATION = 1e-3

#: Relaxations from the identity before the solver is called: one to fail, two to warm-start it well.
SWEEPS = 3


@dataclass(frozen=True)
class Cloud:
    """A cloud's points, made ready once for the cost matrices against all other clouds.

    Attributes
    ----------
    light
        The points, with the heavy channels zero.
    heavy
        The heavy channels alone.
    squared_norm
        Of whole points.
    largest
        Largest squared norm of the light part.
    groups
        Number of each point's value: identical points have the same.
    """

    light: Float32[np.ndarray, "sample feature"]
    heavy: Float64[np.ndarray, "sample heavy"]
    squared_norm: Float64[np.ndarray, " sample"]
    largest: float
    groups: Int64[np.ndarray, " sample"]

    @property
    def has_ties(self) -> bool:
        return int(self.groups.max()) + 1 < len(self.groups)


@dataclass(frozen=True)
class Coupling:
    """What the optimal plan between two paired clouds says.

    Attributes
    ----------
    partner
        `partner[i]` is the point of `x_1` that `x_0[i]` goes to.
    ratio
        `R` of equation 7 with credit for ties: exchanging identical points costs nothing, so of all plans
        that differ only by that, the one nearest to the pairing counts.
    ratio_raw
        `R` without credit: expected over blind choices among identical points. `1 - trace(plan)` if there
        are none.
    transport_cost, identity_cost, random_cost
        Mean cost of a pair under the optimal plan, the given pairing, and a random one.
    """

    partner: Int64[np.ndarray, " sample"]
    ratio: float
    ratio_raw: float
    transport_cost: float
    identity_cost: float
    random_cost: float


def standardised(points: Float[np.ndarray, "sample feature"]) -> Float64[np.ndarray, "sample feature"]:
    """Points with mean 0 and standard deviation 1 in each channel; a constant channel becomes 0."""
    points = points.astype(np.float64)
    points = points - points.mean(0)
    spread = points.std(0)
    return points / np.where(spread > 0, spread, 1)


def directions(points: Float[np.ndarray, "sample feature"]) -> Float64[np.ndarray, "sample feature"]:
    """Points divided by their lengths; a zero point stays where it is, half-way between all directions."""
    points = points.astype(np.float64)
    length = np.sqrt(np.einsum("sf,sf->s", points, points))
    return points / np.where(length > 0, length, 1)[:, None]


def heavy_channels(clouds: Sequence[Float[np.ndarray, "sample feature"]]) -> Int64[np.ndarray, " heavy"]:
    """The channels with the largest magnitudes in any of the clouds."""
    peak = np.max([np.maximum(cloud.max(0), -cloud.min(0)) for cloud in clouds], axis=0)
    return np.sort(np.argsort(peak)[-HEAVY_CHANNELS:]).astype(np.int64)


def make_cloud(
    points: Float[np.ndarray, "sample feature"],
    heavy: Int64[np.ndarray, " heavy"],
    groups: Int64[np.ndarray, " sample"],
) -> Cloud:
    """Split a cloud's points for `cost_matrix`; all clouds of a map share their heavy channels."""
    light = points.astype(np.float32)
    kept = light[:, heavy].astype(np.float64)
    light[:, heavy] = 0
    norm = np.einsum("sf,sf->s", light, light, dtype=np.float64)
    largest = float(norm.max())
    return Cloud(light, kept, norm + np.einsum("sh,sh->s", kept, kept), largest, groups)


def tie_groups(points: Float[np.ndarray, "sample feature"]) -> Int64[np.ndarray, " sample"]:
    """Number the distinct points: identical ones (0 and -0 too) have the same number."""
    rows = np.ascontiguousarray(points + 0)  # -0 + 0 = 0
    values = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def squared_displacement(x_0: Cloud, x_1: Cloud) -> Float64[np.ndarray, " sample"]:
    """`|x_1 - x_0|^2` of each pair, by differences: no cancellation."""
    step = x_1.light - x_0.light
    jump = x_1.heavy - x_0.heavy
    return np.einsum("sf,sf->s", step, step).astype(np.float64) + np.einsum("sh,sh->s", jump, jump)


def cost_matrix(x_0: Cloud, x_1: Cloud, metric: Metric) -> Float64[np.ndarray, "sample sample"]:
    """Cost of every point of `x_0` against every point of `x_1`.

    The product that takes the time is in float32, but for the heavy channels; norms, sums and roots are in
    float64. For `cosine` the clouds must be `directions`: the cost is then half the squared distance.
    """
    product = x_0.light @ x_1.light.T
    squared = _squared(x_0, x_1, product)
    squared.flat[:: len(squared) + 1] = np.inf
    if squared.min() < CANCELLATION * max(x_0.largest, x_1.largest):
        squared = _squared(x_0, x_1, x_0.light.astype(np.float64) @ x_1.light.T.astype(np.float64))
    squared.flat[:: len(squared) + 1] = squared_displacement(x_0, x_1)
    if metric == "euclidean":
        return np.sqrt(squared, out=squared)
    if metric == "cosine":
        squared *= 0.5
    return squared


def _squared(
    x_0: Cloud, x_1: Cloud, product: Float[np.ndarray, "sample sample"]
) -> Float64[np.ndarray, "sample sample"]:
    squared = x_0.heavy @ x_1.heavy.T
    squared += product
    squared *= -2
    squared += x_0.squared_norm[:, None]
    squared += x_1.squared_norm
    return np.maximum(squared, 0, out=squared)


def assign(cost: Float64[np.ndarray, "sample sample"]) -> Int64[np.ndarray, " sample"]:
    """The permutation of least total cost, exactly.

    The identity is optimal if and only if potentials `p` exist with `p_i + c_ij - c_ii >= p_j` for all i, j.
    A few Bellman-Ford relaxations either find them, which saves the solve, or give the solver a start that
    is near the optimum when the identity is. The cost reduced by the potentials has the same optima.
    """
    reduced = cost - cost.diagonal()[:, None]
    potential = np.zeros(len(cost))
    shifted = np.empty_like(reduced)
    for sweep in range(SWEEPS):
        relaxed = np.add(reduced, potential[:, None], out=shifted).min(0)
        if (relaxed >= potential).all():
            return np.arange(len(cost))
        if sweep < SWEEPS - 1:
            potential = relaxed
    np.add(reduced, potential[:, None], out=reduced)
    reduced -= potential
    return linear_sum_assignment(reduced)[1].astype(np.int64)


def recoupled(
    partner: Int[np.ndarray, " sample"],
    groups_0: Int[np.ndarray, " sample"],
    groups_1: Int[np.ndarray, " sample"],
) -> tuple[float, float]:
    """The recoupling ratio of a plan, with and without credit for ties (see `Coupling`).

    Let `F` be how many of the plan's pairs join a group of `x_0` to a group of `x_1`, and `D` how many of
    the given pairs do. Exchanges within groups can bring `min(F, D)` of them to coincide, and a blind choice
    `F D / (sizes of both groups)`. Both depend on the costs alone, not on which optimum a solver happens
    to return.
    """
    count = len(partner)
    stride = int(groups_1.max()) + 1
    given, D = np.unique(groups_0 * stride + groups_1, return_counts=True)  # noqa: N806
    planned, number = np.unique(groups_0 * stride + groups_1[partner], return_counts=True)
    place = np.minimum(np.searchsorted(planned, given), len(planned) - 1)
    F = np.where(planned[place] == given, number[place], 0)  # noqa: N806
    sizes = np.bincount(groups_0)[given // stride] * np.bincount(groups_1)[given % stride]
    return 1 - float(np.minimum(F, D).sum()) / count, 1 - float((F * D / sizes).sum()) / count


def couple(x_0: Cloud, x_1: Cloud, metric: Metric) -> Coupling:
    """The exact optimal plan between paired clouds (equation 6) and its recoupling ratio (equation 7)."""
    cost = cost_matrix(x_0, x_1, metric)
    partner = assign(cost)
    if x_0.has_ties or x_1.has_ties:
        ratio, ratio_raw = recoupled(partner, x_0.groups, x_1.groups)
    else:
        ratio = ratio_raw = 1 - float((partner == np.arange(len(partner))).mean())
    return Coupling(
        partner=partner,
        ratio=ratio,
        ratio_raw=ratio_raw,
        transport_cost=float(np.take_along_axis(cost, partner[:, None], 1).mean()),
        identity_cost=float(cost.diagonal().mean()),
        random_cost=float(cost.mean()),
    )
