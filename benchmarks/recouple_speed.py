"""The recoupling map against the plain loop `ot.dist` + `ot.emd` over pairs, and the time of larger problems.

    python benchmarks/recouple_speed.py                     25 states of width 1024, 8 batches of 256 tokens
    python benchmarks/recouple_speed.py --sizes 1024,4096   time and memory of larger problems
    python benchmarks/recouple_speed.py --solvers           exact solvers, and Sinkhorn, on some pairs' costs

States are a seeded random walk that resembles a residual stream (`residual_stream`): pairs with R = 0 and
with R near 1, equal tokens, and a massive channel. Both sides get the same float16 arrays in memory; no store
is read. The loop runs twice: over all pairs with one BLAS thread, where every ratio is compared, and with
BLAS's own choice of threads over a part of the pairs (`--part`), whose time is scaled. On a busy machine
compare the processor times, and those of one BLAS thread: idle BLAS threads spin.
"""

import argparse
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import ot
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from lftpipe.config.settings import RecoupleSettings
from lftpipe.recoupling.coupling import Coupling, assign, lapjvx, recoupled
from lftpipe.recoupling.map import group_pairs, make_clouds
from lftpipe.recoupling.point_clouds import cost_matrix, tie_groups
from lftpipe.recoupling.sinkhorn import couple_approximately

Key = tuple[int, int, int]

#: Decay of the channels' sizes, and a step's size as a fraction of the stream's. About half of the pairs have
#: R = 0 and the mean is about 0.15.
DECAY, STEP = 0.5, 0.25


def residual_stream(states: int, samples: int, width: int, seed: int) -> np.ndarray:
    """(state, sample, feature) float16: Zipf's embeddings, then steps in proportion to the stream's size.

    The spectrum decays, so that clouds have few effective dimensions, as real ones do. From the middle on one
    channel of a few tokens, those at position 0, holds 20,000.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -DECAY
    spectrum /= np.sqrt((spectrum**2).mean())
    token = np.minimum(rng.zipf(1.4, samples), 5000) - 1
    walk = [0.1 * rng.normal(size=(5000, width))[token] * spectrum]
    drift = rng.normal(size=width) * spectrum
    for number in range(1, states):
        size = 2.0 if number == 1 else STEP * np.sqrt((walk[-1] ** 2).mean())
        walk.append(walk[-1] + size * (rng.normal(size=(samples, width)) * spectrum + 0.3 * drift))
    stream = np.stack(walk)
    stream[states // 2 :, :: max(1, samples // 3), 7] += 20_000
    return stream.astype(np.float16)


def plain_loop(batches: list[np.ndarray], pairs: list[tuple[int, int]]) -> dict[Key, np.ndarray]:
    """The permutation of each batch and pair, in float64."""
    plans = {}
    for number, states in enumerate(batches):
        weights = np.full(states.shape[1], 1 / states.shape[1])
        for m, n in pairs:
            cost = ot.dist(states[m].astype(np.float64), states[n].astype(np.float64), metric="euclidean")
            plans[number, m, n] = ot.emd(weights, weights, cost, numItermax=10**8).argmax(1)
    return plans


def ours(batches: list[np.ndarray], threads: int) -> dict[Key, Coupling]:
    """Couplings of each batch and pair, as `lftpipe recouple` computes them."""
    settings, couplings = RecoupleSettings(), {}
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, "blas"):
        for number, states in enumerate(batches):
            _, clouds = make_clouds(settings, list(states), pool)
            groups = group_pairs(len(states), states.shape[1])
            solved = [pool.submit(clouds.couple, members, n, "euclidean") for members, n in groups]
            for (members, n), future in zip(groups, solved, strict=True):
                couplings |= {(number, m, n): one for m, one in zip(members, future.result(), strict=True)}
    return couplings


def timed(work):
    """The result of `work`, seconds on the clock, and of the processor."""
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, np.array([time.perf_counter() - started, time.process_time() - cpu])


def compare(arguments: argparse.Namespace) -> None:
    """The whole map by lftpipe and by the plain loop; every ratio must be equal."""
    batches = [
        residual_stream(arguments.states, arguments.tokens, arguments.width, seed)
        for seed in range(arguments.batches)
    ]
    pairs = list(combinations(range(arguments.states), 2))
    some = pairs[:: max(1, round(1 / arguments.part))]
    ours([batches[0][:4]], arguments.threads)  # the first call sets up threads
    couplings, before = timed(lambda: ours(batches, arguments.threads))
    with threadpool_limits(1, "blas"):
        plans, loop = timed(lambda: plain_loop(batches, pairs))
    _, threaded = timed(lambda: plain_loop(batches, some))
    _, after = timed(lambda: ours(batches, arguments.threads))
    mine, threaded = (before + after) / 2, threaded * len(pairs) / len(some)
    different = 0
    for (number, m, n), plan in plans.items():
        groups = tie_groups(batches[number][m]), tie_groups(batches[number][n])
        found = couplings[number, m, n]
        different += not np.allclose((found.ratio, found.ratio_raw), recoupled(plan, *groups), atol=1e-12)
    ratios = np.array([coupling.ratio for coupling in couplings.values()])
    print(
        f"{len(couplings)} problems of {arguments.tokens} tokens, width {arguments.width}; R is 0 for "
        f"{np.mean(ratios == 0):.0%}, on average {ratios.mean():.3f}, at most {ratios.max():.3f}"
    )
    print(f"ratios that differ from the loop's: {different} of {len(plans)}")
    name = f"lftpipe, {arguments.threads} threads"
    print(f"{name:40} {mine[0]:7.2f} s {mine[1]:7.2f} s of processor (mean of a run before and one after)")
    for name, spent in (
        ("loop, one BLAS thread, all pairs", loop),
        (f"loop, BLAS as it likes, {len(some)} of {len(pairs)} pairs", threaded),
    ):
        times, saved = spent / mine
        print(
            f"{name:40} {spent[0]:7.2f} s {spent[1]:7.2f} s of processor: "
            f"lftpipe takes {times:.1f} times less time, {saved:.1f} times less processor"
        )
    with threadpool_limits(1, "blas"):
        points = batches[0].astype(np.float32)
        panels = [(points[n - 4 : n].reshape(-1, arguments.width), points[n]) for n in range(4, len(points))]
        _, spent = timed(lambda: [left @ right.T for left, right in panels])
    product = spent[1] / (4 * len(panels))
    print(
        f"a pair: {1e3 * mine[1] / len(couplings):.2f} ms of processor, of which the float32 product takes "
        f"{1e3 * product:.2f}; the loop's {1e3 * loop[1] / len(plans):.2f}"
    )


def larger(sizes: list[int], width: int, threads: int) -> None:
    """Time and memory of three pairs: an easy one, a middling one, and one that is recoupled throughout."""
    for size in sizes:
        states = residual_stream(25, size, width, 0)[[1, 8, 24]]
        couplings, spent = timed(lambda states=states: ours([states], threads))
        found = ", ".join(f"R={one.ratio:.3f}" for one in couplings.values())
        print(
            f"{size} tokens: {spent[0] / len(couplings):.2f} s a pair with {threads} threads, "
            f"{spent[1] / len(couplings):.2f} s of processor (1:8, 1:24, 8:24: {found})"
        )
        with ThreadPoolExecutor(1) as pool, threadpool_limits(1, "blas"):
            _, clouds = make_clouds(RecoupleSettings(), list(states[1:]), pool)
            tracemalloc.start()
            mine, spent = timed(lambda clouds=clouds: clouds.couple([0], 1, "euclidean")[0])
            peak = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            plans, loop = timed(lambda states=states: plain_loop([states[1:]], [(0, 1)]))
        groups = tie_groups(states[1]), tie_groups(states[2])
        same = np.allclose((mine.ratio, mine.ratio_raw), recoupled(plans[0, 0, 1], *groups), atol=1e-12)
        print(
            f"  8:24 alone {spent[1]:.2f} s of processor and at most {peak:.0f} MB; "
            f"the loop {loop[1]:.2f} s, "
            f"{loop[1] / spent[1]:.1f} times as much; ratios {'equal' if same else 'DIFFER'}",
            flush=True,
        )


def solvers(tokens: int, width: int) -> None:
    """Time the assignment alone, by each solver, over pairs of one batch."""
    states = residual_stream(25, tokens, width, 0)
    with ThreadPoolExecutor(1) as pool:
        _, clouds = make_clouds(RecoupleSettings(), list(states), pool)
    weights = np.full(tokens, 1 / tokens)
    ways = {
        "lftpipe": assign,
        "scipy": linear_sum_assignment,
        "ot.emd": lambda cost: ot.emd(weights, weights, cost, numItermax=10**8),
    }
    if lapjvx is not None:
        ways["lapx"] = lapjvx
    pairs = list(combinations(range(25), 2))[::5]
    groups: dict[str, list[list[float]]] = {}
    for m, n in pairs:
        ratio = clouds.couple([m], n, "euclidean")[0].ratio
        cost = cost_matrix(clouds.each[m], clouds.each[n], "euclidean")
        name = "R = 0" if ratio == 0 else "R < 0.3" if ratio < 0.3 else "R >= 0.3"
        spent = [timed(lambda way=way, cost=cost: way(cost))[1][1] for way in ways.values()]
        groups.setdefault(name, []).append(spent)
    for name, rows in sorted(groups.items()):
        means = zip(ways, 1e3 * np.mean(rows, 0), strict=True)
        print(f"{name}, {len(rows)} pairs, ms: " + ", ".join(f"{way} {spent:.2f}" for way, spent in means))
    for m, n in ((1, 4), (1, 12), (8, 24)):
        exact = clouds.couple([m], n, "euclidean")[0].ratio
        blurred, spent = timed(
            lambda m=m, n=n: couple_approximately(clouds.each[m], clouds.each[n], "euclidean", "cpu")
        )
        print(f"{m}:{n}: R = {exact:.3f}, by Sinkhorn {blurred.ratio:.3f} in {spent[0]:.1f} s")


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(description="lftpipe's recoupling map against the plain loop with POT.")
    for name, default in (("states", 25), ("width", 1024), ("tokens", 256), ("batches", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--part", type=float, default=0.25)
    parser.add_argument("--sizes", default="")
    parser.add_argument("--solvers", action="store_true")
    arguments = parser.parse_args()
    if arguments.solvers:
        with threadpool_limits(1, "blas"):
            solvers(arguments.tokens, arguments.width)
    elif arguments.sizes:
        larger([int(size) for size in arguments.sizes.split(",")], arguments.width, arguments.threads)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
