"""Couplings of two clouds: exact assignment by lapx or SciPy, and its recoupling ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64
from scipy.optimize import linear_sum_assignment

from lftpipe.config.settings import Metric
from lftpipe.recoupling.point_clouds import Cloud, relative_displacement, write_costs

# --- Exact assignment, for matrices whose optimum may be, or be near, the identity.
#
# The solver is lapx's Jonker-Volgenant in float64, or SciPy's shortest augmenting path where lapx is not
# installed. Either starts from good potentials, which is what makes it fast.

try:  # the older package `lap` has the same module name, and no lapjvx
    from lap import lapjvx  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
except ImportError:
    lapjvx = None

#: Fraction of rows that have an entry below their own, from which on the solver gets a start: below, lapx
#: alone is faster than the start is made.
FAR = 0.7

#: The entropy that the solver's start is blurred by, as a fraction of the mean cost, the stages in which it
#: is halved, and the rounds of each.
BLUR, STAGES, ROUNDS = 0.2, 3, 3


def solver() -> str:
    """Name and version of what solves: where there are ties, plans (not ratios) depend on it."""
    name = "scipy" if lapjvx is None else "lapx"
    return f"{name} {version(name)}"


def assign(
    cost: Float64[np.ndarray, "sample sample"], spare: Float64[np.ndarray, "sample sample"] | None = None
) -> Int64[np.ndarray, " sample"]:
    """The permutation of least total cost, exactly.

    If no row has an entry below its own, on the diagonal, the identity is optimal, and nothing is solved. If
    most rows have, the identity is far from it, and some rounds of Sinkhorn's algorithm give the solver
    potentials to start from. Costs reduced by any potentials have the same optima: no precision is needed.
    """
    reduced = np.subtract(cost, cost.diagonal()[:, None], out=spare)
    least = reduced.min(1)
    if (least >= 0).all():
        return np.arange(len(cost))
    if lapjvx is not None and (least < 0).mean() < FAR:
        return lapjvx(cost)[2].astype(np.int64)
    reduced -= reduced.min(0)
    reduced -= reduced.min(1)[:, None]
    reduced -= _blurred_potentials(reduced)
    # Where a row's or a column's least entry is not 0, the solvers search long.
    reduced -= reduced.min(1)[:, None]
    reduced -= reduced.min(0)
    partner = linear_sum_assignment(reduced)[1] if lapjvx is None else lapjvx(reduced)[2]
    return partner.astype(np.int64)


def _blurred_potentials(cost: Float64[np.ndarray, "sample sample"]) -> Float64[np.ndarray, " sample"]:
    """Potentials of the columns under a little entropy, by Sinkhorn's algorithm in float32.

    The regularisation is halved from stage to stage, for which the scaled kernel need only be squared.
    Entries are kept off zero, since denormal numbers are a hundred times slower.
    """
    blur = BLUR * float(cost.mean())
    if blur <= 0:
        return np.zeros(len(cost))
    kernel = np.empty(cost.shape, np.float32)
    np.multiply(cost, -1 / blur, out=kernel, casting="same_kind")
    np.maximum(kernel, -40, out=kernel)
    np.exp(kernel, out=kernel)
    potential = np.zeros(len(cost))
    for stage in range(STAGES):
        left = right = np.ones(len(cost), np.float32)
        for _ in range(ROUNDS):
            left = 1 / (kernel @ right)
            right = 1 / (left @ kernel)
        potential += blur * np.log(right, dtype=np.float64)
        if stage < STAGES - 1:
            kernel *= left[:, None]
            kernel *= right
            kernel *= kernel
            np.maximum(kernel, 1e-20, out=kernel)
            blur /= 2
    return potential


# --- Exact optimal transport between two paired clouds, and the recoupling ratio.
#
# Source: Latent Flow Transformer (arXiv 2505.14513), section 3.2, equations 6-7. For `O` pairs with
# uniform weights the optimal plan is a permutation, so this is an assignment problem
# (`lftpipe.recoupling.coupling`).


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

    `partner`: for each point of the first cloud, its partner in the second by the plan.
    `groups_0`: which points of the first cloud are identical, by number.
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

    `cost`: of every point of the first against every point of the second.
    `partner`: for each point of the first cloud, its partner in the second by the plan.
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
