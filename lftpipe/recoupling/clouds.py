"""Clouds of points, made ready once for their costs against all others: light and heavy channels, ties."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

#: Channels whose products are summed in float64: those with the largest values, massive activations first.
#: Without them a float32 product rounds so much more that near ties are decided otherwise than in float64.
HEAVY_CHANNELS = 16


@dataclass(frozen=True)
class Cloud:
    """A cloud's points, made ready once for the costs against all other clouds.

    Attributes
    ----------
    left, right
        Whose product is `|x|^2 + |y|^2 - 2 x.y` but for the light channels of `x.y`.
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

    Parameters
    ----------
    copy
        Float32 memory to use, of the points' shape.
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

    Parameters
    ----------
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
    """Number the distinct points: identical ones (0 and -0 too) have the same number."""
    few = points[:, :8] + 0  # -0 + 0 = 0
    if len({row.tobytes() for row in few}) == len(points):
        return np.arange(len(points))
    numbers: dict[bytes, int] = {}
    rows = points + 0
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)
