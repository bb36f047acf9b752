"""Muon whose orthogonalisation computes in float32: some processors only emulate torch's bfloat16."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def orthogonalised(
    matrix: Float[Tensor, "row column"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "row column"]:
    """Near to the closest orthogonal matrix, by the quintic Newton-Schulz iteration of Muon (Jordan, 2024).

    Parameters
    ----------
    matrix
        What to orthogonalise.
    coefficients
        Of the iteration's polynomial.
    steps
        Iterations.
    eps
        The smallest norm that is divided by.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and Nesterov's momentum, all in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every matrix that has a gradient.

        Parameters
        ----------
        closure
            Not used.
        """
        del closure
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum)
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))
