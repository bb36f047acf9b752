"""Losses through the head in pieces: the same value and gradient as in one."""

import pytest
import torch
from torch import Tensor, nn

from lftpipe.flow import distillation
from lftpipe.flow.distillation import chunked_loss, full_divergence, next_token_loss


@pytest.mark.parametrize("positions", [1, 4, 7, 100])
def test_pieces_change_neither_value_nor_gradient(positions: int) -> None:
    torch.manual_seed(0)
    head, teacher = nn.Linear(8, 30, bias=False), torch.randn(14, 30)
    states = torch.randn(14, 8, requires_grad=True)
    whole = full_divergence(teacher, head(states))
    (expected,) = torch.autograd.grad(3 * whole, states)

    def compare(piece: Tensor, part: slice) -> Tensor:
        return full_divergence(teacher[part], head(piece))

    loss = chunked_loss(states, compare, positions)
    (gradient,) = torch.autograd.grad(3 * loss, states)
    assert torch.allclose(loss, whole, rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert torch.allclose(chunked_loss(states.detach(), compare, positions), whole, rtol=1e-5)


def test_a_position_without_a_target_does_not_count() -> None:
    torch.manual_seed(0)
    logits, following = torch.randn(5, 11), torch.randint(11, (5,))
    targets = torch.tensor([True, True, False, True, False])
    expected = nn.functional.cross_entropy(logits[targets], following[targets], reduction="sum") / 5
    assert torch.allclose(next_token_loss(following, targets, logits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 40, 10_000])
def test_sums_by_rows_are_those_of_the_formula_with_their_gradients(tile, dtype, monkeypatch):
    monkeypatch.setattr(distillation, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 13, generator=generator) for _ in range(2))
    weights = torch.rand(7, generator=generator)

    def plain_divergence(logits: torch.Tensor) -> torch.Tensor:
        log_p, log_q = teacher.to(dtype).float().log_softmax(-1), logits.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    pairs = [
        (lambda logits: distillation.divergence(teacher.to(dtype), logits), plain_divergence),
        (distillation.logsumexp, lambda logits: logits.float().logsumexp(-1)),
    ]
    for ours, formula in pairs:
        found = []
        for function in (ours, formula):
            leaf = student.to(dtype).requires_grad_()
            value = function(leaf)
            (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
            found.append((value.detach(), gradient.float()))
        torch.testing.assert_close(
            found[0], found[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
        with torch.no_grad():
            torch.testing.assert_close(ours(student.to(dtype)), found[0][0])
