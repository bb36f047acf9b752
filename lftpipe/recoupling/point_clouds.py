"""States as clouds of points: scales, heavy channels, ties, and the costs of moving one cloud to another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from lftpipe.config.settings import Metric

# --- Clouds of points, made ready once for their costs against all others: light and heavy channels, ties.

#: Channels whose products are summed in float64: those with the largest values, massive activations first.
#: Without them a float32 product rounds so much more that near ties are decided otherwise than in float64.
HEAVY_CHANNELS = 16


@dataclass(frozen=True)
class Cloud:
    """A cloud's points, made ready once for the costs against all other clouds.

    `left`, `right`: whose product is `|x|^2 + |y|^2 - 2 x.y` but for the light channels of `x.y`.
    `groups`: number of each point's value: identical points have the same.
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


def peaks(
    points: Float[np.ndarray, "sample feature"], copy: Float32[np.ndarray, "sample feature"]
) -> Float32[np.ndarray, " feature"]:
    """Each channel's largest magnitude; leaves the points in `copy`, since float16 is slow to compute in.

    `copy`: float32 memory to use, of the points' shape.
    """
    copy[:] = points
    return np.maximum(copy.max(0), -copy.min(0))


def heavy_channels(peaks: Sequence[Float[np.ndarray, " feature"]]) -> Int64[np.ndarray, " heavy"]:
    """The channels with the largest `peaks` in any of the clouds."""
    return np.sort(np.argsort(np.max(peaks, axis=0))[-HEAVY_CHANNELS:]).astype(np.int64)


def make_cloud(
    points: Float[np.ndarray, "sample feature"],
    heavy: Int64[np.ndarray, " heavy"],
    groups: Int64[np.ndarray, " sample"],
    light: Float32[np.ndarray, "sample feature"],
) -> Cloud:
    """Split a cloud's points; a map's clouds share their heavy channels.

    `light`: a copy of the points, to be kept: its heavy channels are set to zero.
    """
    light[:, heavy] = 0
    kept = points[:, heavy].astype(np.float64)
    light_norm = np.einsum("sf,sf->s", light, light, dtype=np.float64)
    norm = light_norm + np.einsum("sh,sh->s", kept, kept)
    one = np.ones((len(points), 1))
    left, right = np.hstack([kept, norm[:, None], one]), np.hstack([-2 * kept, one, norm[:, None]])
    return Cloud(light, light_norm, kept, left, right, norm, groups)


def tie_groups(points: Float[np.ndarray, "sample feature"]) -> Int64[np.ndarray, " sample"]:
    """Number the distinct points: identical ones (0 and -0 too) have the same number."""
    few = points[:, :8] + 0  # -0 + 0 = 0
    if len({row.tobytes() for row in few}) == len(points):
        return np.arange(len(points))
    numbers: dict[bytes, int] = {}
    rows = points + 0
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


# --- Costs of all points of one cloud against all of another: one product, and differences where it cancels.

#: A squared distance below this fraction of its two squared norms has lost three digits to cancellation in a
#: float32 product: then it is done by differences, or the whole product in float64.
CANCELLATION = 1e-3

#: The same for the given pairs, of which there are few and which all figures rest on.
OWN_CANCELLATION = 0.1


def squared_displacement(x_0: Cloud, x_1: Cloud) -> Float64[np.ndarray, " sample"]:
    """`|x_1 - x_0|^2` of each pair, by differences: no cancellation."""
    return _squared_lengths(x_1.light - x_0.light, x_1.heavy - x_0.heavy)


def _squared_lengths(
    light: Float32[np.ndarray, "sample feature"], heavy: Float64[np.ndarray, "sample heavy"]
) -> Float64[np.ndarray, " sample"]:
    return np.einsum("sf,sf->s", light, light).astype(np.float64) + np.einsum("sh,sh->s", heavy, heavy)


def relative_displacement(x_1: Cloud, displacement: Float64[np.ndarray, " sample"]) -> float:
    """`sum |x_1 - x_0|^2 / sum |x_1|^2`, 0 if all of `x_1` are 0."""
    energy = float(x_1.squared_norm.sum())
    return float(displacement.sum()) / energy if energy else 0.0


def cost_matrix(x_0: Cloud, x_1: Cloud, metric: Metric) -> Float64[np.ndarray, "sample sample"]:
    """Cost of every point of `x_0` against every point of `x_1`.

    For `cosine` the clouds must be `directions`: the cost is then half the squared distance.
    """
    cost = np.empty((len(x_0.light), len(x_1.light)))
    write_costs(x_0, x_1, metric, x_0.light @ x_1.light.T, cost)
    return cost


def write_costs(
    x_0: Cloud,
    x_1: Cloud,
    metric: Metric,
    product: Float32[np.ndarray, "sample sample"],
    cost: Float64[np.ndarray, "sample sample"],
) -> Float64[np.ndarray, " sample"]:
    """Write the costs into `cost`; overwrites `product`.

    Norms, heavy channels, sums and roots are in float64. What cancels is computed by differences.
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
