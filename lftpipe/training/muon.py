"""Muon for matrices of equal shape at once, in float32 or bfloat16, shared among processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Muon as TorchMuon

from lftpipe.training import processes

Matrices = Float[Tensor, "matrix row column"]
Coefficients = tuple[float, float, float]

#: Columns for each row from which the iteration on products of rows takes fewer multiplications.
WIDE = 1.5


def orthogonalised(
    matrices: Matrices, coefficients: Coefficients, steps: int, eps: float, dtype: torch.dtype
) -> Matrices:
    """Near the closest orthogonal matrices, by the quintic Newton-Schulz iteration of Muon (Jordan 2024)."""
    x = matrices.to(dtype)
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=eps)
    if dtype == torch.float32 and x.shape[2] > WIDE * x.shape[1]:
        return _by_products_of_rows(x, coefficients, steps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_products_of_rows(x: Matrices, coefficients: Coefficients, steps: int) -> Matrices:
    """The same iterates from `x x^T` alone.

    Each step multiplies `x` by a polynomial of that product, so that all steps together are one matrix with
    as many columns as `x` has rows. It needs float32: no step looks at `x` again to make rounding good.
    """
    a, b, c = coefficients
    gram, factor = x @ x.mT, None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return x if factor is None else factor @ x


class Muon(TorchMuon):
    """`torch.optim.Muon` scaled to the size of AdamW's steps, with one product for all matrices of a shape.

    Of several processes each orthogonalises its part of the matrices. In bfloat16 on a processor the weights
    are those of `torch.optim.Muon` to the bit.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(list(params), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every matrix that has a gradient."""
        del closure
        if self._dtype == torch.bfloat16 and self.param_groups[0]["params"][0].device.type == "cpu":
            super().step()  # a processor gains nothing from stacks, and keeps its bits
            return
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for weight in weights:
                by_shape.setdefault(tuple(sorted(weight.shape)), []).append(weight)
            for alike in by_shape.values():
                self._move(alike, group)

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape, lying or standing."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        lying = torch.stack([each.T if each.shape[0] > each.shape[1] else each for each in updates])
        given = (group["ns_coefficients"], group["ns_steps"], group["eps"], self._dtype)
        ways = processes.divided(lying, lambda part: orthogonalised(part, *given))
        size = 0.2 * math.sqrt(lying.shape[2])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        for weight, way in zip(weights, ways, strict=True):
            weight.add_(way.T if weight.shape[0] > weight.shape[1] else way, alpha=-group["lr"] * size)
