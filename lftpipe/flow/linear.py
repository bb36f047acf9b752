"""The closed-form linear map from `x_0` to `x_1`: the baseline that needs no training."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.flow.path import States, Times
from lftpipe.teacher.family import AttentionContext

#: Share of the mean diagonal added to it, so that channels that never vary stay solvable.
RIDGE = 1e-6


class LinearMap(nn.Module):
    """`u(x) = W x + b`, used with one Euler step: `x_1 = x_0 + u(x_0)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: States, t: Times, context: AttentionContext) -> States:
        del t, context  # a linear map of each position alone
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x)


class LeastSquares:
    """Sums over batches from which the least-squares map is solved; memory is `width` squared.

    Positions are weighted by one over their target's squared norm, as in `ErrorScale("token")`:
    the unweighted solution serves the few positions with massive activations only.
    """

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, width, dtype=torch.float64)

    def add(self, x_0: States, x_1: States) -> None:
        """Add a batch of pairs."""
        x, y = x_0.flatten(0, -2).double(), (x_1 - x_0).flatten(0, -2).double()
        weight = 1 / (x_1.flatten(0, -2).double().square().sum(-1, keepdim=True) + 1e-12)
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=-1)
        self.gram += (weight * x).T @ x
        self.cross += (weight * x).T @ y

    def solve(self) -> tuple[Float[Tensor, "output input"], Float[Tensor, "output"]]:
        """Weight and bias of the map from `x_0` to `x_1 - x_0`."""
        # Scaling to a unit diagonal first: channels' variances differ by many orders.
        scale = self.gram.diagonal().clamp_min(1e-30).rsqrt()
        gram = scale[:, None] * self.gram * scale + RIDGE * torch.eye(len(scale), dtype=torch.float64)
        solution = scale[:, None] * torch.linalg.solve(gram, scale[:, None] * self.cross)
        return solution[:-1].T.float().contiguous(), solution[-1].float()
