"""Approximate optimal transport for problems too large for an exact solver; needs POT and torch, on use.

The plan of an entropic problem is blurred: it is no permutation, costs more than the optimum, and its ratio
is a guide, not the recoupling ratio. Everything made with it is marked as approximate.
"""

import numpy as np
from jaxtyping import Float64, Int

from lftpipe.coupling import Cloud, Coupling, cost_matrix
from lftpipe.settings import Metric

#: Entropic regularisation as a share of the costs' standard deviation, and the iterations it is given.
REGULARISATION = 0.05
ITERATIONS = 2000
TOLERANCE = 1e-4


def sinkhorn_plan(
    cost: Float64[np.ndarray, "sample sample"], device: str
) -> Float64[np.ndarray, "sample sample"]:
    """Entropic plan of total mass 1 with uniform marginals, in the log domain, by `ot.sinkhorn`."""
    import ot
    import torch

    costs = torch.from_numpy(cost).to(device)
    weights = torch.full((len(cost),), 1 / len(cost), dtype=costs.dtype, device=device)
    spread = float(cost.std())
    plan = ot.sinkhorn(
        weights,
        weights,
        costs,
        REGULARISATION * (spread if spread > 0 else 1.0),
        method="sinkhorn_log",
        numItermax=ITERATIONS,
        stopThr=TOLERANCE,
        warn=False,
    )
    assert isinstance(plan, torch.Tensor)
    return plan.cpu().numpy()


def recoupled_plan(
    plan: Float64[np.ndarray, "sample sample"],
    groups_0: Int[np.ndarray, " sample"],
    groups_1: Int[np.ndarray, " sample"],
) -> tuple[float, float]:
    """The ratios of a plan of total mass 1, as `lftpipe.coupling.recoupled` has them for a permutation."""
    from scipy.sparse import csr_array

    count = len(plan)
    each = np.ones(count), np.arange(count)
    rows = csr_array((each[0], (groups_0, each[1])))
    columns = csr_array((each[0], (groups_1, each[1])))
    mass = count * (columns @ (rows @ plan).T).T
    stride = int(groups_1.max()) + 1
    given, number = np.unique(groups_0 * stride + groups_1, return_counts=True)
    planned = mass[given // stride, given % stride]
    sizes = np.bincount(groups_0)[given // stride] * np.bincount(groups_1)[given % stride]
    ratio = 1 - float(np.minimum(planned, number).sum()) / count
    return ratio, 1 - float((planned * number / sizes).sum()) / count


def couple_approximately(x_0: Cloud, x_1: Cloud, metric: Metric, device: str) -> Coupling:
    """`lftpipe.coupling.couple` by Sinkhorn; `partner` is each row's largest entry, no permutation."""
    cost = cost_matrix(x_0, x_1, metric)
    plan = sinkhorn_plan(cost, device)
    ratio, ratio_raw = recoupled_plan(plan, x_0.groups, x_1.groups)
    return Coupling(
        partner=plan.argmax(1),
        ratio=ratio,
        ratio_raw=ratio_raw,
        transport_cost=float((plan * cost).sum()),
        identity_cost=float(cost.diagonal().mean()),
        random_cost=float(cost.mean()),
    )
