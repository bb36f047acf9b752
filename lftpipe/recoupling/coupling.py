"""Exact optimal transport between two paired clouds, and the recoupling ratio.

Source: Latent Flow Transformer (arXiv 2505.14513), section 3.2, equations 6-7. For `O` pairs with uniform
weights the optimal plan is a permutation, so this is an assignment problem
(`lftpipe.recoupling.assignment`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from lftpipe.config.settings import Metric
from lftpipe.recoupling.assignment import assign
from lftpipe.recoupling.clouds import Cloud
from lftpipe.recoupling.costs import relative_displacement, write_costs


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
    return couple_products([x_0], x_1, metric, (x_0.light @ x_1.light.T)[None])[0]


def couple_products(
    x_0s: Sequence[Cloud],
    x_1: Cloud,
    metric: Metric,
    products: Float32[np.ndarray, "cloud sample sample"],
) -> list[Coupling]:
    """`couple` several clouds with one, given the products of their light parts, which are overwritten."""
    cost, spare = (np.empty(products.shape[1:]) for _ in range(2))
    couplings = []
    for x_0, product in zip(x_0s, products, strict=True):
        displacement = write_costs(x_0, x_1, metric, product, cost)
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
    transported = float(cost[np.arange(len(cost)), partner].mean())
    return coupling_of(x_0, x_1, cost, partner, transported, displacement)


def coupling_of(
    x_0: Cloud,
    x_1: Cloud,
    cost: Float64[np.ndarray, "sample sample"],
    partner: Int64[np.ndarray, " sample"],
    transport_cost: float,
    displacement: Float64[np.ndarray, " sample"],
) -> Coupling:
    """What a plan says.

    Parameters
    ----------
    cost
        Of every point of the first against every point of the second.
    partner
        For each point of the first cloud, its partner in the second by the plan.
    """
    if x_0.has_ties or x_1.has_ties:
        ratio, ratio_raw = recoupled(partner, x_0.groups, x_1.groups)
    else:
        ratio = ratio_raw = 1 - float((partner == np.arange(len(partner))).mean())
    return Coupling(
        partner=partner,
        ratio=ratio,
        ratio_raw=ratio_raw,
        transport_cost=transport_cost,
        identity_cost=float(cost.diagonal().mean()),
        random_cost=float(cost.mean()),
        displacement=relative_displacement(x_1, displacement),
    )
