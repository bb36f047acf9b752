"""The coupling of all pairs of a store's states: batch by batch, in threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lftpipe import progress
from lftpipe.coupling import (
    Cloud,
    Coupling,
    couple,
    directions,
    heavy_channels,
    make_cloud,
    squared_displacement,
    standardised,
    tie_groups,
)
from lftpipe.samples import gather
from lftpipe.settings import RecoupleSettings
from lftpipe.store import Store

#: States held at a time; batches beyond it are read and solved in turn.
HELD_BYTES = 2**30

#: What is averaged over batches.
MEANS = ("ratio", "ratio_raw", "transport_cost", "identity_cost", "random_cost")


def solve_pairs(
    settings: RecoupleSettings, store: Store, layers: tuple[int, ...], samples: np.ndarray
) -> tuple[dict[str, np.ndarray], list[list[list[int] | None]]]:
    """Solve every batch of every pair of layers, in threads, reading each state once.

    Held in memory are the states of as many batches as fit `HELD_BYTES` (at least one), twice for a batch at
    work, and three cost matrices of 8 bytes an entry for each thread: at 4096 tokens 400 MB a thread.

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
    pairs = list(combinations(range(size), 2))
    figures = {name: np.full((count, size, size), np.nan) for name in (*MEANS, "displacement")}
    partners: list[list[list[int] | None]] = [[None] * size for _ in layers]
    together = max(1, HELD_BYTES // (size * settings.tokens * store.width * 4))
    threads = settings.threads or len(os.sched_getaffinity(0))
    # Sinkhorn has threads of its own, or a GPU that one problem fills.
    at_once = 1 if settings.approximate else threads
    with (
        progress.task(f"recouple {len(pairs)} pairs", count * len(pairs), "problems") as task,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(at_once) as solvers,
        # One thread a problem: BLAS's own threads would fight with these.
        threadpool_limits(None if settings.approximate else 1, "blas"),
    ):
        for first in range(0, count, together):
            states = gather(store, layers, samples[first : first + together], pool)
            for batch in range(first, min(first + together, count)):
                plain, clouds = make_clouds(settings, [state[batch - first] for state in states], pool)
                solved = [solvers.submit(_pair, settings, plain, clouds, *pair) for pair in pairs]
                for (m, n), future in zip(pairs, solved, strict=True):
                    coupling, figures["displacement"][batch, m, n] = future.result()
                    for name in MEANS:
                        figures[name][batch, m, n] = getattr(coupling, name)
                    if batch == 0:
                        partners[m][n] = coupling.partner.tolist()
                    task.advance(1)
    return figures, partners


def make_clouds(
    settings: RecoupleSettings, states: list[np.ndarray], pool: ThreadPoolExecutor
) -> tuple[list[Cloud], list[Cloud]]:
    """One batch's states as they are, for displacements, and as the metric wants them."""
    groups = list(pool.map(tie_groups, states))
    plain = _split(states, groups, pool)
    if not settings.standardise and settings.metric != "cosine":
        return plain, plain
    points: list[np.ndarray] = states
    if settings.standardise:
        points = list(pool.map(standardised, points))
    if settings.metric == "cosine":
        points = list(pool.map(directions, points))
    return plain, _split(points, groups, pool)


def _split(points: list[np.ndarray], groups: list[np.ndarray], pool: ThreadPoolExecutor) -> list[Cloud]:
    heavy = heavy_channels(points)
    return list(pool.map(lambda one, group: make_cloud(one, heavy, group), points, groups))


def _pair(
    settings: RecoupleSettings, plain: list[Cloud], clouds: list[Cloud], m: int, n: int
) -> tuple[Coupling, float]:
    energy = plain[n].squared_norm.sum()
    displacement = float(squared_displacement(plain[m], plain[n]).sum() / energy) if energy else 0.0
    if settings.approximate:
        from lftpipe.sinkhorn import couple_approximately

        return couple_approximately(clouds[m], clouds[n], settings.metric, settings.device), displacement
    return couple(clouds[m], clouds[n], settings.metric), displacement


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
