"""The map of all pairs of states: which positions are drawn, what is solved, and its statistics."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from threadpoolctl import threadpool_limits

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.config.settings import Metric, RecoupleSettings
from lftpipe.corpus.packing import positions
from lftpipe.recoupling.coupling import Coupling, couple_products
from lftpipe.recoupling.point_clouds import (
    Cloud,
    directions,
    heavy_channels,
    make_cloud,
    peaks,
    relative_displacement,
    squared_displacement,
    standardised,
    tie_groups,
)
from lftpipe.results.recoupling import Matrix
from lftpipe.store import Store

# --- Random positions of a store's sequences, and their states: each state is read once.

#: Bytes read at a time by each thread.
READ_BYTES = 32 * 2**20


def draw_samples(
    store: Store, *, tokens: int, batches: int, sequences: int, seed: int, skip_first: bool
) -> Int64[np.ndarray, "batch token 2"]:
    """Draw batches of `[sequence, position]` from `train`, uniformly and without replacement.

    Each batch has sequences of its own, so that batches are independent; it draws from all their positions
    alike. A store with too few sequences for that is drawn from as a whole, still without replacement.

    `sequences`: how many sequences a batch draws from; more if it would otherwise take over half of their
    positions.
    `skip_first`: leave out the first position of each segment, where massive activations sit.
    """
    rng = np.random.default_rng(seed)
    available = store.num_sequences("train")
    each = min(max(sequences, -(-2 * tokens // store.context)), available)
    order = rng.permutation(available)
    if each and batches * each <= available:
        pools = [
            _candidates(store, rows, skip_first) for rows in order[: batches * each].reshape(batches, -1)
        ]
        short = min(len(pool) for pool in pools) < tokens
        drawn = [] if short else [pool[rng.choice(len(pool), tokens, replace=False)] for pool in pools]
    else:
        pool = _candidates(store, order, skip_first)
        short = len(pool) < batches * tokens
        drawn = [] if short else np.split(pool[rng.permutation(len(pool))[: batches * tokens]], batches)
    if short:
        have = store.num_sequences("train") * store.context
        raise SettingsError(
            f"--batches {batches} of --tokens {tokens}, {batches * tokens:,} samples",
            f"no more than {store.path} has in train: {have:,} positions"
            + (", fewer without first ones" if skip_first else ""),
            "lower --tokens or --batches, or extract with more --tokens",
        )
    return np.stack([batch[np.lexsort(batch.T[::-1])] for batch in drawn])


def _candidates(
    store: Store, rows: Int64[np.ndarray, " row"], skip_first: bool
) -> Int64[np.ndarray, "place 2"]:
    rows = np.sort(rows)
    if skip_first:
        row, position = np.nonzero(positions(store.document("train", rows.tolist())) > 0)
    else:
        row, position = np.indices((len(rows), store.context)).reshape(2, -1)
    return np.stack([rows[row], position], 1)


def gather(
    store: Store,
    layers: Sequence[int],
    samples: Int64[np.ndarray, "batch token 2"],
    pool: Executor,
) -> list[Float[np.ndarray, "batch token feature"]]:
    """States of the samples, a layer at a time, in the store's dtype; every sequence is read once a layer.

    Raises `StoreError` if a value is not finite, naming layer, sequence, position and channel.
    """
    wanted, inverse = np.unique(samples[..., 0], return_inverse=True)
    inverse = inverse.reshape(samples.shape[:2])
    step = max(1, READ_BYTES // (store.context * store.width * 4))

    def one(layer: int) -> np.ndarray:
        states = None
        for first in range(0, len(wanted), step):
            block = store.read("train", layer, wanted[first : first + step].tolist())
            if states is None:
                states = np.empty((*samples.shape[:2], block.shape[-1]), block.dtype)
            here = (first <= inverse) & (inverse < first + step)
            states[here] = block[inverse[here] - first, samples[..., 1][here]]
        assert states is not None
        if not np.isfinite(states).all():
            batch, token, channel = (int(index[0]) for index in np.nonzero(~np.isfinite(states)))
            sequence, position = samples[batch, token].tolist()
            raise StoreError(
                f"state {layer} that is not finite at sequence {sequence}, position {position}, "
                f"channel {channel}",
                "finite states",
                "run `lftpipe verify`, then extract again",
            )
        return states

    return list(pool.map(one, layers))


# --- What the map says of each pair: means over batches, their errors, and the block influence.

#: Figures of a pair, and what of a `Coupling` is averaged over batches.
MEANS = ("ratio", "ratio_raw", "transport_cost", "identity_cost", "random_cost")
FIGURES = (*MEANS, "displacement", "influence")


def influence(states: list[Float[np.ndarray, "token feature"]]) -> Float64[np.ndarray, "state state"]:
    """One minus the mean cosine of each token's states `h[m]` and `h[n]`, for `m < n`; NaN elsewhere.

    Source: "block influence" of ShortGPT (Men et al., 2024, arXiv 2403.03853). A state of zeros has the
    cosine 0 with every other.
    """
    size = len(states)
    cosines = np.zeros((size, size))
    for some in np.array_split(np.arange(len(states[0])), max(1, len(states[0]) // 64)):
        unit = np.stack([directions(state[some]).reshape(-1) for state in states])
        cosines += unit @ unit.T
    found = np.full((size, size), np.nan)
    upper = np.triu_indices(size, 1)
    found[upper] = 1 - cosines[upper] / len(states[0])
    return found


def statistics(figures: dict[str, Float64[np.ndarray, "batch state state"]]) -> dict[str, Matrix]:
    """Means over batches and what follows from them, as squares `[m][n]`, None where `m >= n`."""
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
    matrices |= {"influence": mean["influence"]}
    return {
        name: [[None if np.isnan(entry) else float(entry) for entry in row] for row in matrix]
        for name, matrix in matrices.items()
    }


# --- The coupling of all pairs of a store's states: batch by batch, in threads.

#: States held at a time; batches beyond it are read and solved in turn.
HELD_BYTES = 2**30

#: Rows of one matrix product: several states against one, where they are small. More gains nothing.
PANEL_ROWS = 1024


@dataclass(frozen=True)
class Solved:
    """The map of all pairs, still batch by batch.

    `figures`: each of `FIGURES` as `(batch, m, n)`, NaN where `m >= n`.
    `partners`: the first batch's plans as square lists `[m][n]`, None where `m >= n`.
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
