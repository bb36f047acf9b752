"""How nearly linear a block is: what the least-squares map from `h[m]` to `h[n]` leaves unexplained.

The map is fitted on some sequences of `train` and measured on others. It needs no training and no teacher.
"""

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch

from lftpipe.base import progress
from lftpipe.base.errors import StoreError
from lftpipe.flow.part import LeastSquares
from lftpipe.flow.path import States
from lftpipe.store import Store, read_in_turn

#: Training tokens that a probe is fitted on, where nothing else is asked.
TOKENS = 16_384

#: Tokens read at a time.
READ_TOKENS = 8192


def draw_parts(store: Store, tokens: int, seed: int) -> tuple[list[int], list[int]]:
    """Sequences of `train` to fit on, `tokens` in all, and a quarter as many others to measure on.

    A store with fewer gives four fifths of what it has to the fit.

    Raises `StoreError` if it has less than two training sequences.
    """
    available = store.num_sequences("train")
    if available < 2:
        raise StoreError(
            f"store {store.path} with {available} training sequences",
            "two at least, to fit a linear probe on one and measure it on another",
            "extract with more --tokens",
        )
    fitted = min(math.ceil(tokens / store.context), max(1, available * 4 // 5))
    measured = min(max(1, fitted // 4), available - fitted)
    order = np.random.default_rng(seed).permutation(available)
    return sorted(order[:fitted].tolist()), sorted(order[fitted : fitted + measured].tolist())


def probe_residual(store: Store, block: tuple[int, int], fit_on: list[int], measure_on: list[int]) -> float:
    """Mean over the tokens of `measure_on` of `||x^_1 - x_1||^2 / ||x_1||^2`, with `x^_1` linear in `x_0`.

    Relative to each token's own target, as the map is fitted (`LeastSquares`): massive activations would
    else be all that counts.
    """
    sums = LeastSquares(store.width, store.width)
    for x_0, x_1 in _pairs(store, block, fit_on):
        sums.add(x_0.double(), x_1 - x_0, x_1)
    weight, bias = sums.solve()
    total, count = 0.0, 0
    for x_0, x_1 in _pairs(store, block, measure_on):
        error = (x_0 + x_0 @ weight.T + bias - x_1).double().square().sum(-1)
        energy = x_1.double().square().sum(-1) + 1e-12
        total += (error / energy).sum().item()
        count += error.numel()
    return total / count


def residual_map(store: Store, layers: tuple[int, ...], seed: int) -> list[list[float | None]]:
    """The residual of all pairs of `layers` as a square `[m][n]`, None where `m >= n`."""
    parts = draw_parts(store, TOKENS, seed)
    residuals: list[list[float | None]] = [[None] * len(layers) for _ in layers]
    pairs = list(combinations(range(len(layers)), 2))
    with progress.task(f"linear probe of {len(pairs)} pairs", len(pairs), "pairs") as task:
        for m, n in pairs:
            residuals[m][n] = probe_residual(store, (layers[m], layers[n]), *parts)
            task.advance(1)
    return residuals


def _pairs(store: Store, block: tuple[int, int], rows: list[int]) -> Iterator[tuple[States, States]]:
    """`x_0` and `x_1` of some training sequences, a few at a time."""
    parts = [("hidden", layer) for layer in block]
    for x_0, x_1 in read_in_turn(store, "train", parts, rows, max(1, READ_TOKENS // store.context)):
        yield torch.from_numpy(x_0).float(), torch.from_numpy(x_1).float()
