"""What moves a flow layer's weights: Muon for its matrices and AdamW for the rest, or AdamW alone."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe.config.settings import TrainSettings
from lftpipe.device import dtype_name, resolve_compute_dtype
from lftpipe.training.muon import Muon
from lftpipe.training.rate import STEP_SIZE, peak_rate

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

    Parameters
    ----------
    flow
        The layer; those of its submodules called `modulation` map the time.
    """

    def __init__(self, flow: nn.Module, settings: TrainSettings) -> None:
        self.learning_rate = peak_rate(settings, None)
        named = list(flow.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and not name.startswith("modulation.")]
        mine = {id(p) for p in matrices} if settings.optimizer == "muon" else set()
        rest = [p for _, p in named if id(p) not in mine]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        if stacks := [p for p in rest if p.ndim > 2]:
            scale = STEP_SIZE[settings.optimizer] / STEP_SIZE["adamw"]
            groups.append({"params": stacks, "weight_decay": settings.weight_decay, "scale": scale})
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self.learning_rate, betas=BETAS, fused=True)
        ]
        if mine:
            dtype = getattr(torch, muon_dtype(settings))
            self._parts.append(Muon(matrices, self.learning_rate, settings.weight_decay, dtype))

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

    Parameters
    ----------
    parameters
        Whose gradients; they are scaled down where the norm is larger than `clip`.
    clip
        The largest norm; 0 never scales.
    """
    return nn.utils.clip_grad_norm_(parameters, clip or torch.inf)
