"""What moves weights: AdamW, or Muon for matrices; and the average of them that is kept."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Muon as TorchMuon

from lftpipe.base.device import dtype_name, resolve_compute_dtype
from lftpipe.config.settings import TrainSettings
from lftpipe.training import distributed

# --- Optimisers: the peak learning rate for a teacher, Muon, and AdamW for the rest.

# --- The learning rate where none is given: what was tuned, but no larger than the teacher's weights allow.
#
# Optimisers step by their rate, whatever the size of the weights, and teachers' weights differ tenfold in
# size. As fractions of the weights, the tuned rates are alike (docs/log.md, "a rate for every teacher").

#: At the peak. Muon's steps are scaled to the size of AdamW's, and may be larger.
LEARNING_RATES = {"muon": 2e-2, "adamw": 3e-3}

#: Of `distil`, by Muon; chosen on sequences held back (docs/results/baselines.md).
DISTIL_RATE = 5e-3

#: Of `distil` where it begins part by part: such students start near their teacher, and large steps
#: would lose that.
SHAPED_RATE = 1e-3

#: Root mean square of what a step at a rate of 1 adds to a matrix (Muon: Liu et al., arXiv 2502.16982).
STEP_SIZE = {"muon": 0.2, "adamw": 1.0}

#: The largest step, as a fraction of the weights' own root mean square; that of `distil` by Muon.
LARGEST_STEP, LARGEST_DISTIL_STEP = 0.075, 0.0185


def peak_rate(settings: TrainSettings, start: nn.Module | None) -> float:
    """The learning rate at its peak: as given, or a default for a layer that starts from another one.

    `start`: the teacher's layer from which the flow layer starts; without one the default is what was tuned.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    rate, largest = LEARNING_RATES[settings.optimizer], LARGEST_STEP
    if settings.objective == "distil" and settings.optimizer == "muon":
        rate, largest = (
            SHAPED_RATE if (settings.loss or "").startswith("local") else DISTIL_RATE,
            LARGEST_DISTIL_STEP,
        )
    if start is None:
        return rate
    return min(rate, _two_digits(largest * weight_size(start) / STEP_SIZE[settings.optimizer]))


def weight_size(layer: nn.Module) -> float:
    """Root mean square of all entries of a layer's matrices; infinite where it has none."""
    matrices = [weight.detach().float() for weight in layer.parameters() if weight.ndim >= 2]
    if not matrices:
        return torch.inf
    squares = sum(matrix.square().sum().item() for matrix in matrices)
    return (squares / sum(matrix.numel() for matrix in matrices)) ** 0.5


def _two_digits(rate: float) -> float:
    """Rounded, so that it is told as it is, and is the same on every machine."""
    return float(f"{rate:.1e}")


# --- Muon for matrices of equal shape at once, in float32 or bfloat16, shared among processes.

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


#: Steps between two orthogonalisations. The momentum of 20 steps hardly turns in four: the KL of students is
#: the same, and the iteration, most of a step on few tokens, costs a quarter (docs/training.md).
EVERY = 4


class Muon(TorchMuon):
    """`torch.optim.Muon` scaled to the size of AdamW's steps, with one product for all matrices of a shape.

    The way that a matrix moves is found anew in every `every`-th step, and kept in between. Of several
    processes each orthogonalises its part of the matrices.
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, weight_decay: float, dtype: torch.dtype, every: int = EVERY
    ) -> None:
        super().__init__(list(params), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._dtype, self._every = dtype, every

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every matrix that has a gradient."""
        del closure
        for group in self.param_groups:
            turns = group.get("steps", 0) % self._every == 0
            group["steps"] = group.get("steps", 0) + 1
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(tuple(sorted(weight.shape)), []).append(weight)
            for alike in by_shape.values():
                self._move(alike, group, turns)

    def _move(self, weights: list[Tensor], group: dict[str, Any], turns: bool) -> None:
        """Matrices of one shape, lying or standing."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        states = [self.state[weight] for weight in weights]
        for state, gradient in zip(states, gradients, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        if turns or any("way" not in state for state in states):
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            for state, way in zip(states, self._ways(list(updates), group), strict=True):
                state["way"] = way
        size = 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        for weight, state in zip(weights, states, strict=True):
            weight.add_(state["way"], alpha=-group["lr"] * size)

    def _ways(self, updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The updates, orthogonalised."""
        # The iteration squares a matrix: that of the shorter side is smaller, and gives the same.
        standing = [update.shape[0] > update.shape[1] for update in updates]
        lying = torch.stack([each.T if tall else each for each, tall in zip(updates, standing, strict=True)])
        options = (group["ns_coefficients"], group["ns_steps"], group["eps"], self._dtype)
        ways = distributed.divided(lying, lambda part: orthogonalised(part, *options))
        return [(way.T if tall else way).clone() for way, tall in zip(ways, standing, strict=True)]


# --- What moves a flow layer's weights: Muon for its matrices and AdamW for the rest, or AdamW alone.

BETAS = (0.9, 0.95)


def rate_fraction(step: int, num_steps: int, warmup: float) -> float:
    """Which fraction of the peak learning rate a step has: a linear warm-up, then a cosine to a hundredth."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def muon_dtype(settings: TrainSettings) -> str:
    """In which Muon orthogonalises: `auto` is bfloat16 only where the device multiplies in it."""
    if settings.muon_dtype != "auto":
        return settings.muon_dtype
    return dtype_name(resolve_compute_dtype("auto", settings.device))


class Optimizer:
    """One or two of torch's optimisers as one, with one learning rate.

    Muon orthogonalises the momentum of each matrix of the layer (Jordan, 2024; `muon.py`), scaled to
    the size of AdamW's steps (Liu et al., arXiv 2502.16982). Vectors, and the maps from the time, which are
    no matrices between features, are AdamW's; so are stacks of matrices (experts), in steps of Muon's size.

    `module`: what learns; in a flow layer, a submodule called `modulation` maps the time.
    `learning_rate`: at its peak.
    `muon`: the format in which Muon orthogonalises; None leaves all weights to AdamW.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, weight_decay: float, muon: torch.dtype | None = None
    ) -> None:
        self.learning_rate = learning_rate
        named = trained_weights(module)
        matrices = [p for name, p in named.items() if p.ndim == 2 and "modulation" not in name.split(".")]
        mine = {id(p) for p in matrices} if muon else set()
        rest = [p for p in named.values() if id(p) not in mine]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        if stacks := [p for p in rest if p.ndim > 2]:
            scale = STEP_SIZE["muon" if muon else "adamw"] / STEP_SIZE["adamw"]
            groups.append({"params": stacks, "weight_decay": weight_decay, "scale": scale})
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self.learning_rate, betas=BETAS, fused=True)
        ]
        if mine and muon:
            self._parts.append(Muon(matrices, learning_rate, weight_decay, muon))

    def step(self, fraction: float) -> float:
        """Move the weights, and forget their gradients; the learning rate of that."""
        rate = fraction * self.learning_rate
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            part.step()
            part.zero_grad(set_to_none=True)
        return rate

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [part.state_dict() for part in self._parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint."""
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)


def gradient_norm(parameters: list[Tensor], clip: float) -> Tensor:
    """The norm of all gradients together.

    `parameters`: whose gradients; they are scaled down where the norm is larger than `clip`.
    `clip`: the largest norm; 0 never scales.
    """
    return nn.utils.clip_grad_norm_(parameters, clip or torch.inf)


# --- Which weights of a run are kept: the last, their average, or the best.

Weights = dict[str, Tensor]


class WeightAverage:
    """Follows a module's weights through training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._average = copy_of(module) if decay else None
        self._best: Weights | None = None
        self.best_loss, self._since_best = math.inf, 0

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after a step."""
        if self._average is not None:
            # A short memory at first, or the average would hold on to where it began.
            decay = min(self._decay, (1 + step) / (10 + step))
            for name, value in trained_weights(self._module).items():
                self._average[name].lerp_(value, 1 - decay)

    def judge(self, loss: float) -> int:
        """Take note of an evaluation; how many there were since the best."""
        if loss < self.best_loss:
            self.best_loss, self._since_best = loss, 0
            with self.shown():
                self._best = copy_of(self._module)
        else:
            self._since_best += 1
        return self._since_best

    def forget_best(self) -> None:
        """Another loss begins, which has another best."""
        self._best, self.best_loss, self._since_best = None, math.inf, 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The module with the averaged weights, if any, as it is evaluated."""
        if self._average is None:
            yield
            return
        trained = copy_of(self._module)
        set_weights(self._module, self._average)
        try:
            yield
        finally:
            set_weights(self._module, trained)

    def settle(self) -> None:
        """Give the module the weights that are kept."""
        if weights := self._best or self._average:
            set_weights(self._module, weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "average": self._average,
            "best": self._best,
            "best_loss": self.best_loss,
            "since_best": self._since_best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._average, self._best = state["average"], state["best"]
        self.best_loss, self._since_best = state["best_loss"], state["since_best"]


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """What learns of a module, by name: all else is the same in every process that makes it."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def copy_of(module: nn.Module) -> Weights:
    """Weights that further training leaves alone."""
    return {name: weight.detach().clone() for name, weight in trained_weights(module).items()}


@torch.no_grad()
def set_weights(module: nn.Module, weights: Weights) -> None:
    """Give a module the weights that `copy_of` gave.

    Raises `ValueError` if they are of another module.
    """
    learns = trained_weights(module)
    if learns.keys() != weights.keys():
        raise ValueError("weights of other names: it was written by another version")
    for name, weight in learns.items():
        weight.copy_(weights[name])
