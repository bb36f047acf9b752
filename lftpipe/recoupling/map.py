"""The coupling of all pairs of a store's states: batch by batch, in threads."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from threadpoolctl import threadpool_limits

from lftpipe import progress
from lftpipe.config.settings import Metric, RecoupleSettings
from lftpipe.recoupling.clouds import (
    Cloud,
    directions,
    heavy_channels,
    make_cloud,
    peaks,
    standardised,
    tie_groups,
)
from lftpipe.recoupling.costs import relative_displacement, squared_displacement
from lftpipe.recoupling.coupling import Coupling, couple_products
from lftpipe.recoupling.sampling import gather
from lftpipe.recoupling.statistics import FIGURES, MEANS, influence
from lftpipe.store import Store

#: States held at a time; batches beyond it are read and solved in turn.
HELD_BYTES = 2**30

#: Rows of one matrix product: several states against one, where they are small. More gains nothing.
PANEL_ROWS = 1024


@dataclass(frozen=True)
class Solved:
    """The map of all pairs, still batch by batch.

    Attributes
    ----------
    figures
        Each of `FIGURES` as `(batch, m, n)`, NaN where `m >= n`.
    partners
        The first batch's plans as square lists `[m][n]`, None where `m >= n`.
    """

    figures: dict[str, Float64[np.ndarray, "batch state state"]]
    partners: list[list[list[int] | None]]

    @classmethod
    def empty(cls, batches: int, size: int) -> "Solved":
        """Of so many batches and states, with nothing solved."""
        figures = {name: np.full((batches, size, size), np.nan) for name in FIGURES}
        return cls(figures, [[None] * size for _ in range(size)])

    def put(self, batch: int, m: int, n: int, coupling: Coupling) -> None:
        """Take in one batch's coupling of a pair."""
        for name in (*MEANS, "displacement"):
            self.figures[name][batch, m, n] = getattr(coupling, name)
        if batch == 0:
            self.partners[m][n] = coupling.partner.tolist()


@dataclass(frozen=True)
class Clouds:
    """One batch's clouds of all states; their light parts lie in one array, `light[state]`."""

    light: Float32[np.ndarray, "state sample feature"]
    each: list[Cloud]

    @classmethod
    def make(
        cls,
        states: list[Float[np.ndarray, "sample feature"]],
        groups: list[Int64[np.ndarray, " sample"]],
        pool: ThreadPoolExecutor,
    ) -> "Clouds":
        """Make the clouds ready in threads; `groups` are those of `tie_groups`."""
        light = np.empty((len(states), *states[0].shape), np.float32)
        heavy = heavy_channels(list(pool.map(peaks, states, light)))
        made = pool.map(lambda *parts: make_cloud(parts[0], heavy, *parts[1:]), states, groups, light)
        return cls(light, list(made))

    def couple(self, members: list[int], n: int, metric: Metric) -> list[Coupling]:
        """Couplings of the neighbouring states `members` with state `n`."""
        left, right = self.light[members[0] : members[-1] + 1], self.light[n]
        products = (left.reshape(-1, left.shape[-1]) @ right.T).reshape(*left.shape[:2], -1)
        return couple_products([self.each[m] for m in members], self.each[n], metric, products)


def make_clouds(
    settings: RecoupleSettings, states: list[Float[np.ndarray, "sample feature"]], pool: ThreadPoolExecutor
) -> tuple[Clouds, Clouds]:
    """One batch's states as they are, for displacements, and as the metric wants them."""
    groups = list(pool.map(tie_groups, states))
    plain = Clouds.make(states, groups, pool)
    if not settings.standardise and settings.metric != "cosine":
        return plain, plain
    points: list[Float[np.ndarray, "sample feature"]] = states
    if settings.standardise:
        points = list(pool.map(standardised, points))
    if settings.metric == "cosine":
        points = list(pool.map(directions, points))
    return plain, Clouds.make(points, groups, pool)


def group_pairs(size: int, tokens: int) -> list[tuple[list[int], int]]:
    """All pairs `m < n` as `([m, ...], n)` with neighbouring `m`, whose costs are one matrix product."""
    step = max(1, PANEL_ROWS // tokens)
    return [(list(range(m, min(m + step, n))), n) for n in range(1, size) for m in range(0, n, step)]


def _couple_group(
    settings: RecoupleSettings, plain: Clouds, clouds: Clouds, members: list[int], n: int
) -> list[Coupling]:
    """Couplings of a group; their displacements are always those of the states as they are."""
    if settings.approximate:
        from lftpipe.recoupling.sinkhorn import couple_approximately

        couplings = [
            couple_approximately(clouds.each[m], clouds.each[n], settings.metric, settings.device)
            for m in members
        ]
    else:
        couplings = clouds.couple(members, n, settings.metric)
    if plain is clouds:
        return couplings
    x_1 = plain.each[n]
    moved = (relative_displacement(x_1, squared_displacement(plain.each[m], x_1)) for m in members)
    return [replace(one, displacement=each) for one, each in zip(couplings, moved, strict=True)]


def solve_pairs(
    settings: RecoupleSettings,
    store: Store,
    layers: tuple[int, ...],
    samples: Int[np.ndarray, "batch token 2"],
) -> Solved:
    """Solve every batch of every pair of layers, in threads, reading each state once.

    Held in memory are the states of as many batches as fit `HELD_BYTES` (at least one), twice for a batch at
    work, and the matrices of each thread (docs/recoupling.md has the figures).
    """
    solved = Solved.empty(len(samples), len(layers))
    groups = group_pairs(len(layers), settings.tokens)
    pairs = sum(len(members) for members, _ in groups)
    threads = settings.threads or len(os.sched_getaffinity(0))
    # Sinkhorn has threads of its own, or a GPU that one problem fills.
    at_once = 1 if settings.approximate else threads
    with (
        progress.task(f"recouple {pairs} pairs", len(samples) * pairs, "problems") as task,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(at_once) as solvers,
        # One thread a problem: BLAS's own threads would fight with these.
        threadpool_limits(None if settings.approximate else 1, "blas"),
    ):
        for batch, states in enumerate(_batches(store, layers, samples, pool)):
            solved.figures["influence"][batch] = influence(states)
            given = (settings, *make_clouds(settings, states, pool))
            futures = [solvers.submit(_couple_group, *given, *group) for group in groups]
            for (members, n), future in zip(groups, futures, strict=True):
                for m, coupling in zip(members, future.result(), strict=True):
                    solved.put(batch, m, n, coupling)
                task.advance(len(members))
    return solved


def _batches(
    store: Store, layers: tuple[int, ...], samples: Int[np.ndarray, "batch token 2"], pool: ThreadPoolExecutor
) -> Iterator[list[Float[np.ndarray, "token feature"]]]:
    """The samples' states, a batch at a time; read for as many batches together as fit `HELD_BYTES`."""
    together = max(1, HELD_BYTES // (len(layers) * samples.shape[1] * store.width * 4))
    for first in range(0, len(samples), together):
        some = samples[first : first + together]
        states = gather(store, layers, some, pool)
        for batch in range(len(some)):
            yield [state[batch] for state in states]
