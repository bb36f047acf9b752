"""Steps chosen token by token: the laws of the rule, on velocities known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lftpipe.flow.solver import ODESolver, sample_adaptively


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turning(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """A field that turns with time and place, on each token alone."""
    return torch.sin(3 * x + 5 * t[:, None, None]) - 0.5 * x


def mixing(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """The same, where each token also sees those before it, as attention does."""
    return turning(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None], t, d)


@pytest.mark.parametrize("field", [turning, mixing])
@given(seed=st.integers(0, 99), k=st.integers(1, 6))
def test_a_threshold_of_zero_is_the_fixed_number_of_steps(field, seed, k):
    x_0 = states(seed, 2, 5, 3)
    sample = sample_adaptively(field, x_0, k, 0.0)
    assert torch.equal(sample.x_1, ODESolver(field).sample(x_0, 1 / k, "euler"))
    assert (sample.evaluations == k).all()


@pytest.mark.parametrize("field", [turning, mixing])
@given(seed=st.integers(0, 99), k=st.integers(1, 6))
def test_an_infinite_threshold_is_one_step(field, seed, k):
    x_0 = states(seed, 2, 5, 3)
    sample = sample_adaptively(field, x_0, k, math.inf)
    torch.testing.assert_close(sample.x_1, ODESolver(field).sample(x_0, 1.0, "euler"))
    assert (sample.evaluations == 1).all()


@given(seed=st.integers(0, 99), k=st.integers(2, 6), thresholds=st.lists(st.floats(0, 2), min_size=2))
def test_a_higher_threshold_never_costs_a_token_more(seed, k, thresholds):
    x_0 = states(seed, 2, 5, 3)
    counts = [sample_adaptively(turning, x_0, k, each).evaluations for each in sorted(thresholds)]
    assert all((low >= high).all() for low, high in pairwise(counts))


def test_tokens_finish_each_on_its_own():
    """A still token settles at once, a straight one after two evaluations, one that turns never."""

    def field(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        u = torch.zeros_like(x)
        u[:, 1] = 1.0
        u[:, 2] = torch.cos(9 * t)[:, None]
        return u

    x_0 = torch.ones(1, 3, 4)
    sample = sample_adaptively(field, x_0, 5, 0.01)
    assert sample.evaluations.tolist() == [[1, 2, 5]]
    torch.testing.assert_close(sample.x_1, ODESolver(field).sample(x_0, 1 / 5, "euler"))


def test_a_finished_token_keeps_its_velocity_whatever_the_field_does_later():
    def field(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return torch.where(t[:, None, None] < 0.5, torch.ones_like(x), 100.0)

    x_0 = torch.zeros(1, 2, 3)
    torch.testing.assert_close(sample_adaptively(field, x_0, 4, 0.1).x_1, torch.ones(1, 2, 3))
    assert sample_adaptively(field, x_0, 4, 0.0).x_1.min() > 10


def test_others_see_a_finished_token_move_on():
    """A token that goes on reads the finished one where it is at that time, not where it stopped."""
    seen = []

    def field(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        seen.append(x[0, 0, 0].item())
        u = torch.ones_like(x)
        u[:, 1] = (7 * t + 1)[:, None]
        return u

    sample = sample_adaptively(field, torch.zeros(1, 2, 3), 4, 0.01)
    assert sample.evaluations.tolist() == [[2, 4]]
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75])


def test_a_prediction_of_zero_is_no_reason_to_fail():
    sample = sample_adaptively(lambda x, t, d: -x, torch.ones(1, 1, 2), 3, math.inf)
    assert sample.x_1.tolist() == [[[0, 0]]]
