"""Losses through the head in pieces: the same value and gradient as in one."""

import pytest
import torch
from torch import Tensor, nn

from lftpipe.flow.distillation import by_pieces, full_divergence, next_token_loss


@pytest.mark.parametrize("positions", [1, 4, 7, 100])
def test_pieces_change_neither_value_nor_gradient(positions: int) -> None:
    torch.manual_seed(0)
    head, teacher = nn.Linear(8, 30, bias=False), torch.randn(14, 30)
    states = torch.randn(14, 8, requires_grad=True)
    whole = full_divergence(teacher, head(states))
    (expected,) = torch.autograd.grad(3 * whole, states)

    def compare(piece: Tensor, part: slice) -> Tensor:
        return full_divergence(teacher[part], head(piece))

    loss = by_pieces(states, compare, positions)
    (gradient,) = torch.autograd.grad(3 * loss, states)
    assert torch.allclose(loss, whole, rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert torch.allclose(by_pieces(states.detach(), compare, positions), whole, rtol=1e-5)


def test_a_position_without_a_target_does_not_count() -> None:
    torch.manual_seed(0)
    logits, following = torch.randn(5, 11), torch.randint(11, (5,))
    targets = torch.tensor([True, True, False, True, False])
    expected = nn.functional.cross_entropy(logits[targets], following[targets], reduction="sum") / 5
    assert torch.allclose(next_token_loss(following, targets, logits), expected)
