"""Muon's updates: those of torch, found anew in some steps only, and at a lower price."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lftpipe.training import distributed, optimizer
from lftpipe.training.optimizer import Muon, Optimizer, orthogonalised

SHAPES = [(24, 24), (8, 24), (8, 24), (24, 24), (64, 24), (64, 24), (24, 64)]
JORDAN = (3.4445, -4.775, 2.0315)


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps_of(optimizer, weights: list[nn.Parameter], count: int = 3) -> list[Tensor]:
    for step in range(count):
        for weight, gradient in zip(weights, matrices(100 + step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


def of_torch(weights: list[nn.Parameter]) -> torch.optim.Muon:
    return torch.optim.Muon(weights, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(matrix) for matrix in matrices(0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_moves_as_torchs_does_up_to_its_rounding(dtype):
    ours, theirs = parameters(), parameters()
    moved = steps_of(Muon(ours, 0.02, 0.01, dtype, every=1), ours)
    for one, other, start in zip(moved, steps_of(of_torch(theirs), theirs), matrices(0), strict=True):
        assert (one - other).norm() < 0.03 * (other - start).norm()


def test_it_keeps_its_way_between_two_orthogonalisations(monkeypatch):
    made = []
    real = optimizer.orthogonalised
    monkeypatch.setattr(optimizer, "orthogonalised", lambda *args: made.append(1) or real(*args))
    weights = parameters()
    ours = Muon(weights, 0.02, 0.0, torch.float32, every=3)
    steps = [[weight.clone() for weight in steps_of(ours, weights, 1)] for _ in range(7)]
    shapes = len({tuple(sorted(shape)) for shape in SHAPES})
    assert len(made) == 3 * shapes
    first, second, third = (
        [b - a for a, b in zip(steps[number], steps[number + 1], strict=True)] for number in range(3)
    )
    for one, two, three in zip(first, second, third, strict=True):
        torch.testing.assert_close(one, two)
        assert not torch.allclose(two, three)


def test_it_goes_on_from_its_state_at_any_step():
    whole, broken = parameters(), parameters()
    want = steps_of(Muon(whole, 0.02, 0.01, torch.float32), whole, 7)
    before = Muon(broken, 0.02, 0.01, torch.float32)
    for step in range(7):
        if step == 5:
            after = Muon(broken, 0.02, 0.01, torch.float32)
            after.load_state_dict(copy.deepcopy(before.state_dict()))
            before = after
        for weight, gradient in zip(broken, matrices(100 + step), strict=True):
            weight.grad = gradient
        before.step()
    assert all(map(torch.equal, want, broken))


def spectrum(values: list[float], rows: int, columns: int, seed: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return (left[:, : len(values)] * torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


@given(st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6), st.integers(0, 99))
def test_products_of_rows_give_the_same_iterates_whatever_the_singular_values(values, seed):
    """Both against the iteration in float64, of matrices as far from orthogonal as momenta are."""
    exact = spectrum(values, 6, 18, seed)
    exact = exact / exact.norm()
    a, b, c = JORDAN
    x = exact.clone()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found = orthogonalised(exact.float()[None], JORDAN, 5, 1e-7, torch.float32)[0]
    torch.testing.assert_close(found.double(), x, rtol=0, atol=2e-3)


def test_wide_matrices_take_the_cheaper_way_and_nothing_else_does(monkeypatch):
    taken = []
    real = optimizer._by_products_of_rows

    def noted(x: Tensor, *rest) -> Tensor:
        taken.append(x.shape)
        return real(x, *rest)

    monkeypatch.setattr(optimizer, "_by_products_of_rows", noted)
    weights = parameters()
    steps_of(Muon(weights, 0.02, 0.01, torch.float32), weights, 1)
    assert [tuple(shape) for shape in taken] == [(2, 8, 24), (3, 24, 64)]
    taken.clear()
    orthogonalised(torch.randn(1, 4, 64), JORDAN, 5, 1e-7, torch.bfloat16)
    assert taken == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_divide_the_matrices_among_them(monkeypatch, world):
    """What each of them makes adds up to what one alone makes."""
    stack = torch.stack([matrix for matrix in matrices(0) if matrix.shape == (64, 24)] * 2).mT
    alone = orthogonalised(stack, JORDAN, 5, 1e-7, torch.float32)
    monkeypatch.setattr(distributed, "count", lambda: world)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda value: None)
    parts, seen = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)

        def work(part: Tensor) -> Tensor:
            seen.append(len(part))
            return orthogonalised(part, JORDAN, 5, 1e-7, torch.float32)

        parts.append(distributed.divided(stack, work))
    assert sum(seen) == len(stack)
    torch.testing.assert_close(torch.stack(parts).sum(0), alone)


def test_stacks_of_matrices_move_in_steps_of_muons_size():
    flow = nn.Module()
    flow.experts = nn.Parameter(torch.ones(3, 8, 8))
    flow.matrix = nn.Parameter(torch.ones(8, 8))
    optimizer = Optimizer(flow, 1e-2, weight_decay=0.0, muon=torch.float32)
    for weight in flow.parameters():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step(1.0)
    sizes = [(weight - 1).square().mean().sqrt().item() for weight in (flow.experts, flow.matrix)]
    assert sizes == pytest.approx([0.2e-2, 0.2e-2], rel=0.15)
