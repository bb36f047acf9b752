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

#: Relaxations from the identity that look for a proof that it is optimal: each costs a tenth of a solve.
SWEEPS = 4

#: The entropy that the solver's start is blurred by, as a share of the mean cost, the stages in which it is
#: halved, and the rounds of each.
BLUR, STAGES, ROUNDS = 0.2, 3, 3


def solver() -> str:
    """Name and version of what solves: where there are ties, plans (not ratios) depend on it."""
    name = "scipy" if lapjvx is None else "lapx"
    return f"{name} {version(name)}"


def assign(cost: Float64[np.ndarray, "sample sample"]) -> Int64[np.ndarray, " sample"]:
    """The permutation of least total cost, exactly.

    The identity is optimal if and only if potentials `p` exist with `p_i + c_ij - c_ii >= p_j` for all i, j.
    A few Bellman-Ford relaxations look for them, which saves the solve. Otherwise some rounds of Sinkhorn's
    algorithm give the solver potentials to start from. Costs reduced by any potentials have the same optima,
    so these need no precision.
    """
    return assign_in_place(cost - cost.diagonal()[:, None], np.empty_like(cost))


def assign_in_place(
    reduced: Float64[np.ndarray, "sample sample"], spare: Float64[np.ndarray, "sample sample"]
) -> Int64[np.ndarray, " sample"]:
    """`assign` on `c_ij - c_ii`, to which it adds `p_i - p_j`; overwrites `spare`."""
    potential = np.zeros(len(reduced))
    relaxed = reduced.min(0)
    for _ in range(SWEEPS - 1):
        if (relaxed >= potential).all():
            return np.arange(len(reduced))
        potential = relaxed
        relaxed = np.add(reduced, potential[:, None], out=spare).min(0)
    if (relaxed >= potential).all():
        return np.arange(len(reduced))
    np.subtract(spare, potential, out=reduced)
    np.subtract(reduced, reduced.min(1)[:, None], out=spare)
    spare -= _blurred_potentials(spare)
    # Where a row's or a column's least entry is not 0, the solvers search long.
    spare -= spare.min(1)[:, None]
    spare -= spare.min(0)
    partner = linear_sum_assignment(spare)[1] if lapjvx is None else lapjvx(spare)[2]
    return partner.astype(np.int64)


def _blurred_potentials(cost: Float64[np.ndarray, "sample sample"]) -> Float64[np.ndarray, " sample"]:
    """Potentials of the columns under a little entropy, by Sinkhorn's algorithm in float32.

    The regularisation is halved from stage to stage, for which the scaled kernel need only be squared.
    Entries are kept off zero, since denormal numbers are a hundred times slower.

    Parameters
    ----------
    cost
        Whose rows have their least entry at 0.
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
