"""The closed-form linear map from `x_0` to `x_1`: the baseline that needs no training."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.families.attention import AttentionContext
from lftpipe.flow.path import States, Times

#: Fraction of each input's own variance added to it, so that channels that never vary stay solvable.
RIDGE = 1e-6


class LinearMap(nn.Module):
    """`u(x) = W x + b`, used with one Euler step: `x_1 = x_0 + u(x_0)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: States, t: Times, context: AttentionContext) -> States:
        """The velocity, which depends on nothing but the state of each position."""
        del t, context  # a linear map of each position alone
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x)


class LeastSquares:
    """Sums over batches from which the least-squares map is solved; memory is the square of the inputs.

    Positions are weighted by one over their target's squared norm, as in `ErrorScale("token")`:
    the unweighted solution serves the few positions with massive activations only.

    Parameters
    ----------
    ridge
        Fraction of each input's own variance that is added to it: how far the map is drawn to zero.
    """

    def __init__(self, inputs: int, outputs: int, ridge: float = RIDGE) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.ridge = ridge

    def add(
        self,
        x: Float[Tensor, "*batch input"],
        y: Float[Tensor, "*batch output"],
        x_1: Float[Tensor, "*batch feature"],
    ) -> None:
        """Add a batch. Products are computed in the precision of `x`, and summed in float64.

        Parameters
        ----------
        y
            What it should give: a part of the way to `x_1`.
        x_1
            The state at the end, whose squared norm weighs each position.
        """
        x, y, x_1 = (each.flatten(0, -2) for each in (x, y, x_1))
        squares = (x_1.cpu() if x_1.device.type == "mps" else x_1).double().square()  # mps has no float64
        weight = (1 / (squares.sum(-1, keepdim=True) + 1e-12)).to(x)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        # On a GPU the sums stay there: nothing is waited for.
        device = x.device if x.device.type == "cuda" else torch.device("cpu")
        self.gram, self.cross = self.gram.to(device), self.cross.to(device)
        self.gram += ((weight * x).T @ x).to(device)
        self.cross += ((weight * x).T @ y.to(x)).to(device)

    def solve(
        self, *, intercept: bool = True
    ) -> tuple[Float[Tensor, "output input"], Float[Tensor, "output"]]:
        """Weight and bias of the map.

        Parameters
        ----------
        intercept
            Whether it has a bias; without, the bias is zero.
        """
        # Scaling to a unit diagonal first: channels' variances differ by many orders.
        used = len(self.gram) if intercept else len(self.gram) - 1
        gram, cross = self.gram[:used, :used].cpu(), self.cross[:used].cpu()
        scale = gram.diagonal().clamp_min(1e-30).rsqrt()
        gram = scale[:, None] * gram * scale + self.ridge * torch.eye(len(scale), dtype=torch.float64)
        solution = scale[:, None] * torch.linalg.solve(gram, scale[:, None] * cross)
        weight = solution[: len(self.gram) - 1].T.float().contiguous()
        return weight, solution[-1].float() if intercept else weight.new_zeros(len(weight))
