"""The integer programme: every layer once, the least summed score, within the budget."""

import itertools
import random

import pytest

from lftpipe.base.shape import Part
from lftpipe.planning.choice import Budget, Pool, cheapest, choose
from lftpipe.results.plan import Candidate, Cost

LAYERS = 5


def cost(parameters: int, layers: int) -> Cost:
    return Cost(parameters=parameters, layers=layers, prefill=parameters / 7, decode=parameters / 3)


def pool(seed: int) -> Pool:
    """Narrow layers and short blocks with random scores."""
    draw = random.Random(seed)
    parts = [Part(m, m + 1, "layer", width=width) for m in range(LAYERS) for width in (0.25, 0.5)]
    parts += [Part(m, m + length, "layer") for length in (2, 3) for m in range(LAYERS - length + 1)]
    parts += [Part(m, m + 1, "skip") for m in range(LAYERS)]
    sizes = [0 if part.kind == "skip" else round(100 * part.width) for part in parts]
    candidates = [
        Candidate(part=part, score=draw.random() + 0.01, stderr=0.1, cost=cost(size, part.layers))
        for part, size in zip(parts, sizes, strict=True)
    ]
    return Pool(candidates, [cost(100, 1)] * LAYERS, cost(50, 0))


def by_hand(given: Pool, budget: Budget) -> float | None:
    """The least score by trying every set of up to five candidates that do not overlap."""
    best = None
    for count in range(LAYERS + 1):
        for chosen in itertools.combinations(given.candidates, count):
            layers = [layer for each in chosen for layer in range(*each.part.block)]
            if len(layers) == len(set(layers)) and budget.of(given.cost(chosen)) <= budget.most + 1e-9:
                total = sum(each.score for each in chosen)
                best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "budget", [Budget("parameters", 300), Budget("layers", 3), Budget("decode", 330 / 3), Budget("layers", 5)]
)
def test_it_is_the_best_of_all_shapes(seed: int, budget: Budget) -> None:
    given = pool(seed)
    chosen = choose(given, budget)
    assert chosen is not None
    assert budget.of(given.cost(chosen)) <= budget.most + 1e-9
    blocks = [each.part.block for each in chosen]
    assert blocks == sorted(blocks)
    assert sum(each.score for each in chosen) == pytest.approx(by_hand(given, budget))


def test_no_shape_keeps_a_budget_below_the_smallest() -> None:
    given = pool(0)
    least = cheapest(given, Budget("parameters", 0))
    assert least == 50  # every layer is left out
    assert choose(given, Budget("parameters", least - 1)) is None
    assert choose(given, Budget("parameters", least)) is not None


def test_a_part_that_is_forbidden_is_not_chosen() -> None:
    given, budget = pool(1), Budget("parameters", 300)
    first = choose(given, budget)
    assert first is not None
    other = choose(given, budget, [first[0].part])
    assert other is not None
    assert first[0].part not in [each.part for each in other]
    assert sum(each.score for each in other) >= sum(each.score for each in first)
