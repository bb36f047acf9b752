"""What the map says of each pair: means over batches, their errors, and the block influence."""

import numpy as np
from jaxtyping import Float, Float64

from lftpipe.artefacts.recoupling import Matrix
from lftpipe.recoupling.clouds import directions

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
