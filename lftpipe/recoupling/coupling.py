"""Exact optimal transport between two paired clouds, and the recoupling ratio.

Source: Latent Flow Transformer (arXiv 2505.14513), section 3.2, equations 6-7. For `O` pairs with uniform
weights the optimal plan is a permutation, so this is an assignment
problem (`lftpipe.recoupling.assignment`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64

from lftpipe.config.settings import Metric
from lftpipe.recoupling.assignment import assign

#: Channels whose products are summed in float64: those with the largest values, massive activations first.
#: Without them a float32 product rounds so much more that near ties are decided otherwise than in float64.
HEAVY_CHANNELS = 16

#: A squared distance below this share of its two squared norms has lost three digits to cancellation in a
#: float32 product: then it is done by differences, or the whole product in float64.
CANCELLATION = 1e-3

#: The same for the given pairs, of which there are few and which all figures rest on.
OWN_CANCELLATION = 0.1


@dataclass(frozen=True)
class Cloud:
    """A cloud's points, made ready once for the costs against all other clouds.

    Attributes
    ----------
    light
        The points, with the heavy channels zero.
    light_norm
        Their squared norms.
    heavy
        The heavy channels alone.
    left, right
        Whose product is `|x|^2 + |y|^2 - 2 x.y` but for the light channels of `x.y`.
    squared_norm
        Of whole points.
    groups
        Number of each point's value: identical points have the same.
    """

    light: Float32[np.ndarray, "sample feature"]
    light_norm: Float64[np.ndarray, " sample"]
    heavy: Float64[np.ndarray, "sample heavy"]
    left: Float64[np.ndarray, "sample heavy+2"]
    right: Float64[np.ndarray, "sample heavy+2"]
    squared_norm: Float64[np.ndarray, " sample"]
    groups: Int64[np.ndarray, " sample"]

    @property
    def has_ties(self) -> bool:
        """Whether any two points are identical."""
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
    displacement
        `sum |x_1 - x_0|^2 / sum |x_1|^2` of the given pairs, 0 if all of `x_1` are 0.
    """

    partner: Int64[np.ndarray, " sample"]
    ratio: float
    ratio_raw: float
    transport_cost: float
    identity_cost: float
    random_cost: float
    displacement: float


def standardised(points: Float[np.ndarray, "sample feature"]) -> Float64[np.ndarray, "sample feature"]:
    """Points with mean 0 and standard deviation 1 in each channel; a constant channel becomes 0.

    Parameters
    ----------
    points
        One point for each token.
    """
    points = points.astype(np.float64)
    points = points - points.mean(0)
    spread = points.std(0)
    return points / np.where(spread > 0, spread, 1)


def directions(points: Float[np.ndarray, "sample feature"]) -> Float64[np.ndarray, "sample feature"]:
    """Points divided by their lengths; a zero point stays where it is, half-way between all directions.

    Parameters
    ----------
    points
        One point for each token.
    """
    points = points.astype(np.float64)
    length = np.sqrt(np.einsum("sf,sf->s", points, points))
    return points / np.where(length > 0, length, 1)[:, None]


def peaks(
    points: Float[np.ndarray, "sample feature"], copy: Float32[np.ndarray, "sample feature"]
) -> Float32[np.ndarray, " feature"]:
    """Each channel's largest magnitude; leaves the points in `copy`, since float16 is slow to compute in.

    Parameters
    ----------
    points
        One point for each token.
    copy
        Float32 memory to use, of the points' shape.
    """
    copy[:] = points
    return np.maximum(copy.max(0), -copy.min(0))


def heavy_channels(peaks: Sequence[Float[np.ndarray, " feature"]]) -> Int64[np.ndarray, " heavy"]:
    """The channels with the largest `peaks` in any of the clouds.

    Parameters
    ----------
    peaks
        The largest magnitude of each channel.
    """
    return np.sort(np.argsort(np.max(peaks, axis=0))[-HEAVY_CHANNELS:]).astype(np.int64)


def make_cloud(
    points: Float[np.ndarray, "sample feature"],
    heavy: Int64[np.ndarray, " heavy"],
    groups: Int64[np.ndarray, " sample"],
    light: Float32[np.ndarray, "sample feature"],
) -> Cloud:
    """Split a cloud's points; a map's clouds share their heavy channels.

    Parameters
    ----------
    points
        One point for each token.
    heavy
        Channels to multiply in float64.
    groups
        Which points are identical, by number.
    light
        A copy of the points, to be kept: its heavy channels are set to zero.
    """
    light[:, heavy] = 0
    kept = points[:, heavy].astype(np.float64)
    light_norm = np.einsum("sf,sf->s", light, light, dtype=np.float64)
    norm = light_norm + np.einsum("sh,sh->s", kept, kept)
    one = np.ones((len(points), 1))
    left, right = np.hstack([kept, norm[:, None], one]), np.hstack([-2 * kept, one, norm[:, None]])
    return Cloud(light, light_norm, kept, left, right, norm, groups)


def tie_groups(points: Float[np.ndarray, "sample feature"]) -> Int64[np.ndarray, " sample"]:
    """Number the distinct points: identical ones (0 and -0 too) have the same number.

    Parameters
    ----------
    points
        One point for each token.
    """
    few = points[:, :8] + 0  # -0 + 0 = 0
    if len({row.tobytes() for row in few}) == len(points):
        return np.arange(len(points))
    numbers: dict[bytes, int] = {}
    rows = points + 0
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


def squared_displacement(x_0: Cloud, x_1: Cloud) -> Float64[np.ndarray, " sample"]:
    """`|x_1 - x_0|^2` of each pair, by differences: no cancellation.

    Parameters
    ----------
    x_0
        Points of the first cloud.
    x_1
        Points of the second, in the same order.
    """
    return _squared_lengths(x_1.light - x_0.light, x_1.heavy - x_0.heavy)


def _squared_lengths(
    light: Float32[np.ndarray, "sample feature"], heavy: Float64[np.ndarray, "sample heavy"]
) -> Float64[np.ndarray, " sample"]:
    return np.einsum("sf,sf->s", light, light).astype(np.float64) + np.einsum("sh,sh->s", heavy, heavy)


def relative_displacement(x_1: Cloud, displacement: Float64[np.ndarray, " sample"]) -> float:
    """`sum |x_1 - x_0|^2 / sum |x_1|^2`, 0 if all of `x_1` are 0.

    Parameters
    ----------
    x_1
        One point for each token.
    displacement
        Squared distance of each point to its partner.
    """
    energy = float(x_1.squared_norm.sum())
    return float(displacement.sum()) / energy if energy else 0.0


def cost_matrix(x_0: Cloud, x_1: Cloud, metric: Metric) -> Float64[np.ndarray, "sample sample"]:
    """Cost of every point of `x_0` against every point of `x_1`.

    For `cosine` the clouds must be `directions`: the cost is then half the squared distance.

    Parameters
    ----------
    x_0
        Points of the first cloud.
    x_1
        Points of the second, in the same order.
    metric
        `euclidean`, `sqeuclidean` or `cosine`.
    """
    cost = np.empty((len(x_0.light), len(x_1.light)))
    _costs(x_0, x_1, metric, x_0.light @ x_1.light.T, cost)
    return cost


def _costs(
    x_0: Cloud,
    x_1: Cloud,
    metric: Metric,
    product: Float32[np.ndarray, "sample sample"],
    cost: Float64[np.ndarray, "sample sample"],
) -> Float64[np.ndarray, " sample"]:
    """Write the costs into `cost` and return `|x_1 - x_0|^2` of the given pairs; overwrites `product`.

    `product` is that of the light parts, in float32. Norms, heavy channels, sums and roots are in float64.
    What cancels is computed by differences.
    """
    count = len(cost)
    product *= 2
    displacement = _displacement(x_0, x_1, product.diagonal())
    product.reshape(-1)[:: count + 1] = -np.inf  # the diagonal is known: never near
    # |x - y|^2 < C (|x|^2 + |y|^2) is 2 x.y > (1 - C) (|x|^2 + |y|^2).
    norm_0, norm_1 = (((1 - CANCELLATION) * cloud.light_norm).astype(np.float32) for cloud in (x_0, x_1))
    near = product > norm_0[:, None] + norm_1
    rows, columns = np.nonzero(near) if near.any() else ([], [])
    np.matmul(x_0.left, x_1.right.T, out=cost)
    if len(rows) > count:
        cost -= 2 * (x_0.light.astype(np.float64) @ x_1.light.T.astype(np.float64))
    else:
        cost -= product
        if len(rows):
            light = x_1.light[columns] - x_0.light[rows]
            cost[rows, columns] = _squared_lengths(light, x_1.heavy[columns] - x_0.heavy[rows])
    np.maximum(cost, 0, out=cost)
    cost.reshape(-1)[:: count + 1] = displacement
    if metric == "euclidean":
        np.sqrt(cost, out=cost)
    elif metric == "cosine":
        cost *= 0.5
    return displacement


def _displacement(
    x_0: Cloud, x_1: Cloud, twice_product: Float32[np.ndarray, " sample"]
) -> Float64[np.ndarray, " sample"]:
    """`squared_displacement`, by differences only where the product cancels."""
    norms = x_0.light_norm + x_1.light_norm
    light = norms - twice_product
    near = np.flatnonzero(light < OWN_CANCELLATION * norms)
    if len(near) > len(light) // 2:
        return squared_displacement(x_0, x_1)
    if len(near):
        steps = x_1.light[near] - x_0.light[near]
        light[near] = np.einsum("sf,sf->s", steps, steps)
    heavy = x_1.heavy - x_0.heavy
    return light + np.einsum("sh,sh->s", heavy, heavy)


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

    Parameters
    ----------
    partner
        For each point of the first cloud, its partner in the second by the plan.
    groups_0
        Which points of the first cloud are identical, by number.
    groups_1
        The same of the second.
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
    """The exact optimal plan between paired clouds (equation 6) and its recoupling ratio (equation 7).

    Parameters
    ----------
    x_0
        Points of the first cloud.
    x_1
        Points of the second, in the same order.
    metric
        `euclidean`, `sqeuclidean` or `cosine`.
    """
    return couple_products([x_0], x_1, metric, (x_0.light @ x_1.light.T)[None])[0]


def couple_products(
    x_0s: Sequence[Cloud],
    x_1: Cloud,
    metric: Metric,
    products: Float32[np.ndarray, "cloud sample sample"],
) -> list[Coupling]:
    """`couple` several clouds with one, given the products of their light parts, which are overwritten.

    Parameters
    ----------
    x_0s
        Clouds of the starts.
    x_1
        Cloud of the end.
    metric
        `euclidean`, `sqeuclidean` or `cosine`.
    products
        Their inner products.
    """
    cost, spare = (np.empty(products.shape[1:]) for _ in range(2))
    couplings = []
    for x_0, product in zip(x_0s, products, strict=True):
        displacement = _costs(x_0, x_1, metric, product, cost)
        couplings.append(_couple(x_0, x_1, displacement, cost, spare))
    return couplings


def _couple(
    x_0: Cloud,
    x_1: Cloud,
    displacement: Float64[np.ndarray, " sample"],
    cost: Float64[np.ndarray, "sample sample"],
    spare: Float64[np.ndarray, "sample sample"],
) -> Coupling:
    """The coupling under the costs; overwrites `spare`."""
    partner = assign(cost, spare)
    if x_0.has_ties or x_1.has_ties:
        ratio, ratio_raw = recoupled(partner, x_0.groups, x_1.groups)
    else:
        ratio = ratio_raw = 1 - float((partner == np.arange(len(partner))).mean())
    return Coupling(
        partner=partner,
        ratio=ratio,
        ratio_raw=ratio_raw,
        transport_cost=float(cost[np.arange(len(cost)), partner].mean()),
        identity_cost=float(cost.diagonal().mean()),
        random_cost=float(cost.mean()),
        displacement=relative_displacement(x_1, displacement),
    )
