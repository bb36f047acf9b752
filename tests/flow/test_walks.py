import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lftpipe.flow.objective import ErrorScale, flow_matching, flow_walking, walk_times
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath
from lftpipe.flow.solver import EVALUATIONS, ODESolver

NMSE = ErrorScale("none")


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Solvers


def decay(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """`dx/dt = t - x`, whose solution is `t - 1 + (x_0 + 1) exp(-t)`."""
    return t.to(x.dtype)[:, None, None] - x


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_a_solver_has_its_order(method, order):
    x_0 = states(0, 3, 2, 4).double()
    exact = (x_0 + 1) * math.exp(-1)
    errors = [(ODESolver(decay).sample(x_0, 1 / k, method) - exact).abs().max().item() for k in (16, 32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.06)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("method", EVALUATIONS)
@given(k=st.integers(1, 9))
def test_nfe_is_the_number_of_evaluations(method, k):
    calls = []
    ODESolver(lambda x, t, d: calls.append(t) or x).sample(torch.zeros(2, 1, 1), 1 / k, method)
    assert len(calls) == k * EVALUATIONS[method]
    assert all(t.min() >= 0 and t.max() < 1 for t in calls)


@pytest.mark.parametrize("method", EVALUATIONS)
def test_a_velocity_is_told_the_size_of_its_step(method):
    told: list[tuple[float, ...]] = []
    grid = walk_times(torch.tensor([[0.1, 0.5], [0.7, 0.6]]))
    ODESolver(lambda x, t, d: told.append(tuple(d.tolist())) or x).sample(
        torch.zeros(2, 1, 1), method=method, time_grid=grid
    )
    steps = [(0.1, 0.5), (0.6, 0.1), (0.3, 0.4)]
    expected = [step for step in steps for _ in range(EVALUATIONS[method])]
    assert [pytest.approx(step) for step in expected] == told


@pytest.mark.parametrize("method", EVALUATIONS)
def test_a_constant_velocity_is_solved_exactly_on_any_grid(method):
    x_0, x_1 = states(0, 2, 3, 4), states(1, 2, 3, 4)
    grid = walk_times(torch.rand(4, 2, generator=torch.Generator().manual_seed(0)))
    reached = ODESolver(lambda x, t, d: x_1 - x_0).sample(x_0, method=method, time_grid=grid)
    torch.testing.assert_close(reached, x_1)


def test_each_sequence_walks_by_its_own_times():
    x_0 = states(0, 2, 3, 4)
    grid = walk_times(torch.tensor([[0.2, 0.7]]))
    together = ODESolver(decay).sample(x_0, method="euler", time_grid=grid)
    alone = [
        ODESolver(decay).sample(x_0[i : i + 1], method="euler", time_grid=grid[:, i : i + 1]) for i in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@given(st.integers(0, 6), st.integers(0, 1000))
def test_a_walk_goes_from_0_to_1_in_order(draws, seed):
    grid = walk_times(torch.rand(draws, 3, generator=torch.Generator().manual_seed(seed)))
    assert grid.shape == (draws + 2, 3)
    assert (grid[0] == 0).all()
    assert (grid[-1] == 1).all()
    assert (grid.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("method", EVALUATIONS)
@given(k=st.integers(1, 12))
def test_equal_steps_are_a_time_grid_of_equal_times(method, k):
    x_0 = states(0, 2, 3, 4)
    by_size = ODESolver(decay).sample(x_0, step_size=1 / k, method=method)
    by_times = ODESolver(decay).sample(x_0, method=method, time_grid=torch.linspace(0, 1, k + 1))
    assert torch.equal(by_size, by_times)


def test_a_way_can_be_walked_in_parts():
    x_0, times = states(0, 2, 3, 4), torch.tensor([0.0, 0.2, 0.7, 1.0])
    halfway = ODESolver(decay).sample(x_0, time_grid=times[:3])
    torch.testing.assert_close(
        ODESolver(decay).sample(halfway, time_grid=times[2:]), ODESolver(decay).sample(x_0, time_grid=times)
    )


def test_left_out_there_is_one_step():
    x_0 = states(0, 2, 3, 4)
    assert torch.equal(ODESolver(decay).sample(x_0), ODESolver(decay).sample(x_0, 1.0))


@pytest.mark.parametrize("step_size", [0.3, 0.0, -0.5, 2.0, 0.9])
def test_steps_that_do_not_divide_the_way_are_refused(step_size):
    with pytest.raises(ValueError, match=f"step_size {step_size} is not 1/k"):
        ODESolver(decay).sample(states(0, 2, 3, 4), step_size)


def test_equal_steps_and_own_times_exclude_each_other():
    with pytest.raises(ValueError, match="either step_size or time_grid"):
        ODESolver(decay).sample(states(0, 2, 3, 4), 0.5, time_grid=torch.tensor([0.0, 1.0]))


# Paths


@given(st.integers(0, 1000))
def test_the_straight_path_joins_the_pairs(seed):
    x_0, x_1 = states(seed, 3, 2, 4), states(seed + 1, 3, 2, 4)
    sample = LinearPath(x_0, x_1).sample(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(sample.x_t, torch.stack([x_0[0], (x_0[1] + x_1[1]) / 2, x_1[2]]))
    torch.testing.assert_close(sample.dx_t, x_1 - x_0)


@given(st.integers(1, 6), st.integers(0, 100))
def test_the_trajectory_passes_through_the_teachers_states(segments, seed):
    h = states(seed, segments + 1, 1, 2, 3)
    path = PiecewiseLinearPath(h)
    for i in range(segments + 1):
        sample = path.sample(torch.tensor([i / segments]))
        torch.testing.assert_close(sample.x_t, h[i], atol=1e-5, rtol=1e-5)
    # The derivative carries one state to the next: its mean over the path is the way from end to end.
    middles = [path.sample(torch.tensor([(i + 0.5) / segments])).dx_t for i in range(segments)]
    torch.testing.assert_close(torch.stack(middles).mean(0), h[-1] - h[0], atol=1e-5, rtol=1e-5)


def test_a_trajectory_of_one_layer_is_the_straight_path():
    h, t = states(0, 2, 3, 2, 4), torch.tensor([0.1, 0.6, 0.9])
    one, straight = PiecewiseLinearPath(h).sample(t), LinearPath(h[0], h[1]).sample(t)
    torch.testing.assert_close(one.x_t, straight.x_t)
    torch.testing.assert_close(one.dx_t, straight.dx_t)


# Objectives


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_the_minimiser_of_sfm_on_gaussians_is_the_known_one(t):
    """`u = mu + (t s^2 - (1-t)) / var(x_t) (x - t mu)` for independent `x_0 ~ N(0,1)`, `x_1 ~ N(mu,s^2)`."""
    mu, s = 2.0, 1.5
    x_0, x_1 = states(0, 40, 1000, 1).double(), mu + s * states(1, 40, 1000, 1).double()
    sample = LinearPath(x_0, x_1).sample(torch.full((40,), t))
    known_slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)

    def loss(parameters: Tensor) -> Tensor:
        return flow_matching(lambda x, *_: parameters[0] * x + parameters[1], sample, x_1, NMSE)

    start = torch.zeros(2, dtype=torch.float64)
    # The loss is quadratic in slope and offset: one step of Newton's reaches the minimum.
    gradient = torch.autograd.functional.jacobian(loss, start)
    slope, offset = start - torch.linalg.solve(torch.autograd.functional.hessian(loss, start), gradient)
    assert slope.item() == pytest.approx(known_slope, abs=0.02)
    assert offset.item() == pytest.approx(mu - known_slope * t * mu, abs=0.04)


class Toy(nn.Module):
    """A small velocity that depends on everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + t.to(x.dtype)[:, None, None]


def pair() -> tuple[Tensor, Tensor]:
    return states(0, 3, 2, 4).double(), states(1, 3, 2, 4).double()


@pytest.mark.parametrize(
    "scale", [ErrorScale("token"), ErrorScale("none"), ErrorScale("channel", torch.ones(4))]
)
def test_walking_in_one_step_of_euler_is_regression(scale):
    velocity, (x_0, x_1) = Toy(), pair()
    end = ODESolver(velocity).sample(x_0, method="euler", time_grid=walk_times(torch.empty(0, 3)))
    walking = flow_walking(end, x_1, scale)
    torch.testing.assert_close(walking, scale(x_0 + velocity(x_0, torch.zeros(3), torch.ones(3)) - x_1, x_1))


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_a_relative_error_does_not_know_its_unit(unit, seed):
    error, x_1 = states(seed, 2, 3, 4), states(seed + 1, 2, 3, 4)
    variance = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for scale, scaled in (
        (NMSE, NMSE),
        (ErrorScale("token"), ErrorScale("token")),
        (ErrorScale("channel", variance), ErrorScale("channel", unit**2 * variance)),
    ):
        torch.testing.assert_close(scaled(unit * error, unit * x_1), scale(error, x_1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scale(2 * error, x_1), 4 * scale(error, x_1))
        assert scale(0 * error, x_1) == 0


def test_what_each_scale_makes_count_the_same():
    error, x_1 = states(0, 2, 3, 4), states(1, 2, 3, 4)
    token = torch.tensor([[1.0, 10.0, 1000.0], [1.0, 0.1, 5.0]])[..., None]
    torch.testing.assert_close(
        ErrorScale("token")(token * error, token * x_1), ErrorScale("token")(error, x_1)
    )
    channel, variance = torch.tensor([1.0, 10.0, 1000.0, 0.1]), x_1.flatten(0, 1).var(0)
    torch.testing.assert_close(
        ErrorScale("channel", channel**2 * variance)(channel * error, channel * x_1),
        ErrorScale("channel", variance)(error, x_1),
    )
    torch.testing.assert_close(NMSE(error, x_1), error.square().sum() / x_1.square().sum())


def test_a_channel_scale_without_the_variance_is_refused():
    with pytest.raises(ValueError, match="needs the channel variance"):
        ErrorScale("channel")


@pytest.mark.parametrize("variance", [0.0, 1e-15])
def test_a_channel_that_never_varies_does_not_rule_the_channel_scale(variance):
    error, x_1 = states(0, 2, 3, 5), states(1, 2, 3, 5)
    others = torch.tensor([1.0, 2.0, 3.0, 4e6])
    loss = ErrorScale("channel", torch.cat([others, torch.tensor([variance])]))(error, x_1)
    typical = torch.cat([others, torch.tensor([2.0])])
    torch.testing.assert_close(loss, (error.square() / typical).mean())
    assert ErrorScale("channel", torch.zeros(5))(error, x_1) < 10
