"""Exact assignment, for matrices whose optimum may be, or be near, the identity.

The solver is lapx's Jonker-Volgenant in float64, or SciPy's shortest augmenting path where lapx is not
installed. Either starts from good potentials, which is what makes it fast.
"""

from importlib.metadata import version

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment

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
