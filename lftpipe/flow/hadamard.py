"""Hadamard matrices of the orders that widths of models have."""

import torch
from jaxtyping import Float
from torch import Tensor


def hadamard(order: int) -> Float[Tensor, "order order"]:
    """An orthogonal matrix whose entries are all `1 / sqrt(order)` or its negative.

    Paley's constructions, doubled as often as needed by Sylvester's: all orders `2^a` and `2^a p` with `p`
    one above a prime of the form `4k + 3`, or twice one above a prime of the form `4k + 1`.

    Raises
    ------
    ValueError
        If these constructions know no matrix of that order.
    """
    core, doublings = order, 0
    while (matrix := _core(core)) is None:
        if core % 2:
            raise ValueError(f"neither Paley nor Sylvester constructs a Hadamard matrix of order {order}")
        core, doublings = core // 2, doublings + 1
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(doublings):
        matrix = torch.kron(double, matrix)
    return matrix / order**0.5


def _core(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1)
    if order % 4 == 0 and _is_prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order) + _skew(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _symmetric(order // 2 - 1)
        return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
            torch.eye(order // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        )
    return None


def _residues(prime: int) -> Tensor:
    """Jacobsthal's matrix: 1 where indices differ by a square modulo the prime, else -1; 0 if equal."""
    squares = {(number * number) % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _bordered(prime: int, left: float) -> Tensor:
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, left, _residues(prime)
    return matrix


def _skew(prime: int) -> Tensor:
    return _bordered(prime, -1.0)


def _symmetric(prime: int) -> Tensor:
    return _bordered(prime, 1.0)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
