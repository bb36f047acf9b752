"""The coupling of all pairs of a store's states: batch by batch, in threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from threadpoolctl import threadpool_limits

from lftpipe import progress
from lftpipe.config.settings import Metric, RecoupleSettings
from lftpipe.recoupling.coupling import (
    Cloud,
    Coupling,
    couple_products,
    directions,
    heavy_channels,
    make_cloud,
    peaks,
    relative_displacement,
    squared_displacement,
    standardised,
    tie_groups,
)
from lftpipe.recoupling.sampling import gather
from lftpipe.store import Store

#: States held at a time; batches beyond it are read and solved in turn.
HELD_BYTES = 2**30

#: Rows of one matrix product: several states against one, where they are small. More gains nothing.
PANEL_ROWS = 1024

#: What is averaged over batches.
MEANS = ("ratio", "ratio_raw", "transport_cost", "identity_cost", "random_cost")


@dataclass(frozen=True)
class Clouds:
    """One batch's clouds of all states; their light parts lie in one piece, `light[state]`."""

    light: Float32[np.ndarray, "state sample feature"]
    each: list[Cloud]

    @classmethod
    def make(cls, states: list[np.ndarray], groups: list[np.ndarray], pool: ThreadPoolExecutor) -> "Clouds":
        light = np.empty((len(states), *states[0].shape), np.float32)
        heavy = heavy_channels(list(pool.map(peaks, states, light)))
        made = pool.map(lambda *parts: make_cloud(parts[0], heavy, *parts[1:]), states, groups, light)
        return cls(light, list(made))

    def couple(self, members: list[int], n: int, metric: Metric) -> list[Coupling]:
        """Couplings of the neighbouring states `members` with state `n`."""
        left, right = self.light[members[0] : members[-1] + 1], self.light[n]
        products = (left.reshape(-1, left.shape[-1]) @ right.T).reshape(*left.shape[:2], -1)
        return couple_products([self.each[m] for m in members], self.each[n], metric, products)


def solve_pairs(
    settings: RecoupleSettings, store: Store, layers: tuple[int, ...], samples: np.ndarray
) -> tuple[dict[str, np.ndarray], list[list[list[int] | None]]]:
    """Solve every batch of every pair of layers, in threads, reading each state once.

    Held in memory are the states of as many batches as fit `HELD_BYTES` (at least one), twice for a batch at
    work, and the matrices of each thread (docs/recoupling.md has the figures).

    Parameters
    ----------
    layers
        States to compare, ascending.
    samples : (batch, token, 2)
        Which `[sequence, position]` of `train`.

    Returns
    -------
    figures
        Each of `MEANS` and `displacement` as `(batch, m, n)`, NaN where `m >= n`.
    partners
        The first batch's plans as square lists `[m][n]`, None where `m >= n`.
    """
    count, size = len(samples), len(layers)
    groups = group_pairs(size, settings.tokens)
    problems = count * size * (size - 1) // 2
    figures = {name: np.full((count, size, size), np.nan) for name in (*MEANS, "displacement")}
    partners: list[list[list[int] | None]] = [[None] * size for _ in layers]
    together = max(1, HELD_BYTES // (size * settings.tokens * store.width * 4))
    threads = settings.threads or len(os.sched_getaffinity(0))
    # Sinkhorn has threads of its own, or a GPU that one problem fills.
    at_once = 1 if settings.approximate else threads
    with (
        progress.task(f"recouple {problems // count} pairs", problems, "problems") as task,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(at_once) as solvers,
        # One thread a problem: BLAS's own threads would fight with these.
        threadpool_limits(None if settings.approximate else 1, "blas"),
    ):
        for first in range(0, count, together):
            states = gather(store, layers, samples[first : first + together], pool)
            for batch in range(first, min(first + together, count)):
                plain, clouds = make_clouds(settings, [state[batch - first] for state in states], pool)
                solved = [solvers.submit(_couple_group, settings, plain, clouds, *group) for group in groups]
                for (members, n), future in zip(groups, solved, strict=True):
                    couplings, displacements = future.result()
                    figures["displacement"][batch, members, n] = displacements
                    for name in MEANS:
                        figures[name][batch, members, n] = [getattr(one, name) for one in couplings]
                    if batch == 0:
                        for m, coupling in zip(members, couplings, strict=True):
                            partners[m][n] = coupling.partner.tolist()
                    task.advance(len(members))
    return figures, partners


def group_pairs(size: int, tokens: int) -> list[tuple[list[int], int]]:
    """All pairs `m < n` as `([m, ...], n)` with neighbouring `m`, whose costs are one matrix product."""
    step = max(1, PANEL_ROWS // tokens)
    return [(list(range(m, min(m + step, n))), n) for n in range(1, size) for m in range(0, n, step)]


def make_clouds(
    settings: RecoupleSettings, states: list[np.ndarray], pool: ThreadPoolExecutor
) -> tuple[Clouds, Clouds]:
    """One batch's states as they are, for displacements, and as the metric wants them."""
    groups = list(pool.map(tie_groups, states))
    plain = Clouds.make(states, groups, pool)
    if not settings.standardise and settings.metric != "cosine":
        return plain, plain
    points: list[np.ndarray] = states
    if settings.standardise:
        points = list(pool.map(standardised, points))
    if settings.metric == "cosine":
        points = list(pool.map(directions, points))
    return plain, Clouds.make(points, groups, pool)


def _couple_group(
    settings: RecoupleSettings, plain: Clouds, clouds: Clouds, members: list[int], n: int
) -> tuple[list[Coupling], list[float]]:
    if settings.approximate:
        from lftpipe.recoupling.sinkhorn import couple_approximately

        couplings = [
            couple_approximately(clouds.each[m], clouds.each[n], settings.metric, settings.device)
            for m in members
        ]
    else:
        couplings = clouds.couple(members, n, settings.metric)
    if plain is clouds:
        return couplings, [coupling.displacement for coupling in couplings]
    x_1 = plain.each[n]
    return couplings, [relative_displacement(x_1, squared_displacement(plain.each[m], x_1)) for m in members]


def statistics(figures: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over batches and what follows from them, as JSON-plain squares `[m][n]`, None where `m >= n`."""
    mean = {name: figure.mean(0) for name, figure in figures.items()}
    ratios = figures["ratio"]
    spread = (
        ratios.std(0, ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else np.full_like(ratios[0], np.nan)
    )
    identity = mean["identity_cost"]
    saved = identity - mean["transport_cost"]
    gap = np.divide(saved, identity, out=np.where(np.isnan(identity), np.nan, 0.0), where=identity > 0)
    matrices = {name: mean[name] for name in MEANS[:2]} | {"ratio_stderr": spread}
    matrices |= {name: mean[name] for name in MEANS[2:]}
    matrices |= {"relative_gap": gap, "relative_displacement": mean["displacement"]}
    return {
        name: [[None if np.isnan(entry) else float(entry) for entry in row] for row in matrix]
        for name, matrix in matrices.items()
    }
