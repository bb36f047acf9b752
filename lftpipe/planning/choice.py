"""The least summed score under a budget: one integer programme over candidates. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lftpipe.base.shape import Part
from lftpipe.results.plan import Candidate, Cost

#: By how much a shape may pass its budget: rounding of sums.
SLACK = 1e-9


@dataclass(frozen=True)
class Budget:
    """The most that a student may have of one cost."""

    kind: str
    """`parameters`, `layers` or `decode`."""
    most: float

    def of(self, cost: Cost) -> float:
        """What counts of a cost."""
        return float(getattr(cost, self.kind))


@dataclass(frozen=True)
class Pool:
    """What can be chosen from: candidates, and every layer of the teacher as it is."""

    candidates: Sequence[Candidate]
    layers: Sequence[Cost]
    """Of every layer of the teacher."""
    around: Cost
    """Of the embedding, the final norm and the head."""

    def cost(self, parts: Sequence[Candidate]) -> Cost:
        """Of the student with these parts."""
        replaced = {layer for candidate in parts for layer in range(*candidate.part.block)}
        total = self.around
        for index, cost in enumerate(self.layers):
            total = total if index in replaced else total + cost
        for candidate in parts:
            total = total + candidate.cost
        return total


def cheapest(pool: Pool, budget: Budget) -> float:
    """The least that any shape has of a budget's cost."""
    chosen = _solve(pool, [budget.of(candidate.cost) for candidate in pool.candidates], None, budget, ())
    assert chosen is not None
    return budget.of(pool.cost(chosen))


def choose(pool: Pool, budget: Budget, without: Sequence[Part] = ()) -> list[Candidate] | None:
    """The candidates of the least summed score within a budget, in order; None where nothing is.

    `without`: parts that are not to be chosen.
    """
    return _solve(pool, [candidate.score for candidate in pool.candidates], budget.most, budget, without)


def _solve(
    pool: Pool, values: Sequence[float], most: float | None, budget: Budget, without: Sequence[Part]
) -> list[Candidate] | None:
    """One variable for each candidate, then one for each layer that stays; each layer is covered once."""
    layers, count = len(pool.layers), len(pool.candidates)
    covers = np.zeros((layers, count + layers))
    for number, candidate in enumerate(pool.candidates):
        covers[candidate.part.start : candidate.part.stop, number] = 1
    covers[:, count:] = np.eye(layers)
    costs = [budget.of(candidate.cost) for candidate in pool.candidates] + list(map(budget.of, pool.layers))
    constraints = [LinearConstraint(covers, 1, 1)]
    if most is not None:
        room = most - budget.of(pool.around)
        scale = max(abs(room), SLACK)  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(np.array(costs) / scale, -np.inf, room / scale + SLACK))
        keep = np.zeros(layers)
    else:
        keep = np.array(costs[count:])
    upper = np.ones(count + layers)
    upper[:count] = [candidate.part not in without for candidate in pool.candidates]
    objective = np.concatenate([values, keep])
    bounds = Bounds(np.zeros_like(upper), upper)  # pyright: ignore[reportArgumentType]
    found = milp(
        objective,
        constraints=constraints,
        integrality=np.ones(count + layers),
        bounds=bounds,
    )
    if found.x is None:
        return None
    chosen = [
        candidate for candidate, take in zip(pool.candidates, found.x[:count], strict=True) if take > 0.5
    ]
    return sorted(chosen, key=lambda candidate: candidate.part.start)
