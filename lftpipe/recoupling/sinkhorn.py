"""Approximate optimal transport for problems too large for an exact solver; needs POT and torch, on use.

The plan of an entropic problem is blurred: it is no permutation, costs more than the optimum, and its ratio
is a guide, not the recoupling ratio. Everything made with it is marked as approximate.
"""

import numpy as np
from jaxtyping import Float64

from lftpipe.config.settings import Metric
from lftpipe.recoupling.coupling import Coupling, coupling_of
from lftpipe.recoupling.point_clouds import Cloud, cost_matrix, squared_displacement

#: Entropic regularisation as a fraction of the costs' interquartile range, which massive activations do not
#: stretch, and the iterations it is given.
REGULARISATION = 0.05
ITERATIONS = 500
TOLERANCE = 1e-4


def sinkhorn_plan(
    cost: Float64[np.ndarray, "sample sample"], device: str
) -> Float64[np.ndarray, "sample sample"]:
    """Entropic plan of total mass 1 with uniform marginals, in the log domain, by `ot.sinkhorn`."""
    import ot
    import torch

    device = "cpu" if device == "mps" else device  # which has no float64
    costs = torch.from_numpy(cost).to(device)
    weights = torch.full((len(cost),), 1 / len(cost), dtype=costs.dtype, device=device)
    spread = float(np.subtract(*np.quantile(cost, (0.75, 0.25))))
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


def couple_approximately(x_0: Cloud, x_1: Cloud, metric: Metric, device: str) -> Coupling:
    """`recoupling.coupling.couple` by Sinkhorn; `partner` is each row's largest entry, no permutation.

    The ratio counts these largest entries: the plan's trace is far more blurred (docs/recoupling.md).
    """
    cost = cost_matrix(x_0, x_1, metric)
    plan = sinkhorn_plan(cost, device)
    displacement = squared_displacement(x_0, x_1)
    return coupling_of(x_0, x_1, cost, plan.argmax(1), float((plan * cost).sum()), displacement)
