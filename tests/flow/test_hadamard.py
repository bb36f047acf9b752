"""Hadamard matrices: orthogonal, all entries of one size, and refused where none is known."""

import pytest
import torch

from lftpipe.training.closed_form import hadamard


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 64, 192, 576, 640, 896, 1024])
def test_it_is_orthogonal_with_entries_of_one_size(order: int) -> None:
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize("order", [3, 6, 5 * 2, 92])
def test_an_order_without_a_known_construction_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"of order {order}"):
        hadamard(order)
