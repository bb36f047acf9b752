"""The recoupling map against the plain loop `ot.dist` + `ot.emd` over pairs, and the time of larger problems.

    python benchmarks/recouple_speed.py [--states 25] [--width 1024] [--tokens 256] [--batches 8] [--part 1]
        [--loop-threads 0]
    python benchmarks/recouple_speed.py --sizes 1024,4096

States are a seeded random walk that resembles a residual stream: embeddings of Zipf-distributed tokens with a
decaying spectrum, a large first step, small ones in between, a large last one, and a few tokens with massive
activations. Both sides get the same float16 arrays in memory; reading a store is not measured. `--part 0.1`
runs the loop on every tenth pair and scales its time, for busy machines.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import ot
from threadpoolctl import threadpool_limits

from lftpipe.coupling import couple, recoupled, tie_groups
from lftpipe.pairs import make_clouds
from lftpipe.settings import RecoupleSettings


def residual_stream(states: int, samples: int, width: int, seed: int) -> np.ndarray:
    """(state, sample, feature) float16"""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.4
    spectrum /= np.sqrt((spectrum**2).mean())
    token = np.minimum(rng.zipf(1.4, samples), 5000) - 1
    walk = [0.1 * rng.normal(size=(5000, width))[token] * spectrum]
    drift = rng.normal(size=width) * spectrum
    for number in range(1, states):
        size = 2.0 if number == 1 else 3.0 if number == states - 1 else 0.45
        walk.append(walk[-1] + size * rng.normal(size=(samples, width)) * spectrum + 0.1 * drift)
    stream = np.stack(walk)
    stream[states // 2 :, :: max(1, samples // 3), 7] += 20_000
    return stream.astype(np.float16)


def plain_loop(
    batches: list[np.ndarray], pairs: list[tuple[int, int]]
) -> dict[tuple[int, int, int], np.ndarray]:
    """The permutation of each batch and pair, in float64."""
    plans = {}
    for number, states in enumerate(batches):
        weights = np.full(states.shape[1], 1 / states.shape[1])
        for m, n in pairs:
            cost = ot.dist(states[m].astype(np.float64), states[n].astype(np.float64), metric="euclidean")
            plans[number, m, n] = ot.emd(weights, weights, cost, numItermax=10**8).argmax(1)
    return plans


def ours(batches: list[np.ndarray], pairs: list[tuple[int, int]], threads: int):
    """Couplings of each batch and pair, as `lftpipe recouple` computes them."""
    settings, couplings = RecoupleSettings(), {}
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, "blas"):
        for number, states in enumerate(batches):
            _, clouds = make_clouds(settings, list(states), pool)
            solved = pool.map(lambda pair, c=clouds: couple(c[pair[0]], c[pair[1]], "euclidean"), pairs)
            couplings |= {(number, *pair): coupling for pair, coupling in zip(pairs, solved, strict=True)}
    return couplings


def compare(arguments: argparse.Namespace) -> None:
    batches = [
        residual_stream(arguments.states, arguments.tokens, arguments.width, seed)
        for seed in range(arguments.batches)
    ]
    pairs = list(combinations(range(arguments.states), 2))
    some = pairs[:: max(1, round(1 / arguments.part))]
    ours(batches[:1], pairs[:8], arguments.threads)  # the first call sets up threads
    started, cpu = time.perf_counter(), time.process_time()
    couplings = ours(batches, pairs, arguments.threads)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    started, cpu = time.perf_counter(), time.process_time()
    with threadpool_limits(arguments.loop_threads or None, "blas"):
        plans = plain_loop(batches, some)
    scale = len(pairs) / len(some)
    loop, cpu_loop = scale * (time.perf_counter() - started), scale * (time.process_time() - cpu)
    different = 0
    for (number, m, n), plan in plans.items():
        groups = tie_groups(batches[number][m]), tie_groups(batches[number][n])
        mine = couplings[number, m, n]
        different += not np.allclose((mine.ratio, mine.ratio_raw), recoupled(plan, *groups), atol=1e-12)
    ratios = [coupling.ratio for coupling in couplings.values()]
    print(
        f"{len(couplings)} problems of {arguments.tokens} tokens, width {arguments.width}; "
        f"{arguments.threads} threads, the loop's BLAS {arguments.loop_threads or 'as it likes'}"
    )
    print(
        f"R is 0 for {np.mean(np.array(ratios) == 0):.0%}, on average {np.mean(ratios):.3f}, "
        f"at most {max(ratios):.3f}"
    )
    print(f"lftpipe     {seconds:7.2f} s   {cpu_seconds:7.2f} s of processor")
    print(
        f"plain loop  {loop:7.2f} s   {cpu_loop:7.2f} s of processor   "
        f"({len(some)} of {len(pairs)} pairs timed)"
    )
    print(f"{loop / seconds:.1f} times faster, {cpu_loop / cpu_seconds:.1f} times less processor time")
    print(f"ratios that differ: {different} of {len(plans)}")


def larger(sizes: list[int], width: int, threads: int) -> None:
    for size in sizes:
        states = residual_stream(6, size, width, 0)
        pairs = [(0, 1), (1, 3), (1, 5), (2, 4)]
        started = time.perf_counter()
        couplings = ours([states], pairs, threads)
        seconds = time.perf_counter() - started
        found = ", ".join(f"{m}:{n} R={couplings[0, m, n].ratio:.3f}" for m, n in pairs)
        print(
            f"{size} tokens: {seconds / len(pairs):.2f} s a pair with {threads} threads ({found})", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="lftpipe's recoupling map against the plain loop with POT.")
    for name, default in (("states", 25), ("width", 1024), ("tokens", 256), ("batches", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--loop-threads", type=int, default=0, help="BLAS threads of the loop; 0: as it likes"
    )
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--sizes", default="")
    arguments = parser.parse_args()
    if arguments.sizes:
        larger([int(size) for size in arguments.sizes.split(",")], arguments.width, arguments.threads)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
