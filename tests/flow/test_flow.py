import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lftpipe.flow.linear import LeastSquares, LinearMap
from lftpipe.flow.objective import ErrorScale, flow_matching, flow_walking, walk_times
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath
from lftpipe.flow.solver import EVALUATIONS, ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.family import AttentionContext, attention_context
from lftpipe.teacher.parts import load_layer, load_rotary
from lftpipe.teacher.source import Teacher

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
    errors = [(ODESolver(decay, method).sample(x_0, k) - exact).abs().max().item() for k in (16, 32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.06)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("method", EVALUATIONS)
@given(k=st.integers(1, 9))
def test_nfe_is_the_number_of_evaluations(method, k):
    calls = []
    solver = ODESolver(lambda x, t, d: calls.append(t) or x, method)
    solver.sample(torch.zeros(2, 1, 1), k)
    assert len(calls) == solver.evaluations(k)
    assert all(t.min() >= 0 and t.max() < 1 for t in calls)


@pytest.mark.parametrize("method", EVALUATIONS)
def test_a_velocity_is_told_the_size_of_its_step(method):
    told: list[tuple[float, ...]] = []
    grid = walk_times(torch.tensor([[0.1, 0.5], [0.7, 0.6]]))
    ODESolver(lambda x, t, d: told.append(tuple(d.tolist())) or x, method).walk(torch.zeros(2, 1, 1), grid)
    steps = [(0.1, 0.5), (0.6, 0.1), (0.3, 0.4)]
    expected = [step for step in steps for _ in range(EVALUATIONS[method])]
    assert [pytest.approx(step) for step in expected] == told


@pytest.mark.parametrize("method", EVALUATIONS)
def test_a_constant_velocity_is_solved_exactly_on_any_grid(method):
    x_0, x_1 = states(0, 2, 3, 4), states(1, 2, 3, 4)
    grid = walk_times(torch.rand(4, 2, generator=torch.Generator().manual_seed(0)))
    reached = ODESolver(lambda x, t, d: x_1 - x_0, method).walk(x_0, grid)
    torch.testing.assert_close(reached, x_1)


def test_each_sequence_walks_by_its_own_times():
    x_0 = states(0, 2, 3, 4)
    grid = walk_times(torch.tensor([[0.2, 0.7]]))
    together = ODESolver(decay, "euler").walk(x_0, grid)
    alone = [ODESolver(decay, "euler").walk(x_0[i : i + 1], grid[:, i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone))


@given(st.integers(0, 6), st.integers(0, 1000))
def test_a_walk_goes_from_0_to_1_in_order(draws, seed):
    grid = walk_times(torch.rand(draws, 3, generator=torch.Generator().manual_seed(seed)))
    assert grid.shape == (draws + 2, 3)
    assert (grid[0] == 0).all() and (grid[-1] == 1).all()
    assert (grid.diff(dim=0) >= 0).all()


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
    end = ODESolver(velocity, "euler").walk(x_0, walk_times(torch.empty(0, 3)))
    walking = flow_walking(end, x_1, scale)
    torch.testing.assert_close(walking, scale(x_0 + velocity(x_0, torch.zeros(3), torch.ones(3)) - x_1, x_1))


@pytest.mark.parametrize("method", EVALUATIONS)
def test_the_gradient_of_walking_goes_through_all_steps(teacher, method):
    """Against finite differences along a random direction in all weights, in float64."""
    step, rtol = 1e-6, 1e-5
    velocity, context = flow_of(teacher, 6)
    if teacher.family.name == "llama":  # transformers' RMSNorm computes in float32 whatever it is given
        for name in ("input_layernorm", "post_attention_layernorm"):
            eps = teacher.config.rms_norm_eps
            setattr(velocity.layer.layer, name, torch.nn.RMSNorm(teacher.width, eps))
    velocity = velocity.double().requires_grad_(True)
    context = AttentionContext(
        tuple(part.double() for part in context.rotary), context.mask, context.position_ids
    )
    x_0, x_1 = (states(seed, 2, 6, teacher.width).double() for seed in (0, 1))
    grid = walk_times(torch.tensor([[0.3, 0.5], [0.6, 0.1]]))
    parameters = list(velocity.parameters())
    start = [0.1 * states(i, *each.shape).double() + each.detach() for i, each in enumerate(parameters)]
    direction = [states(100 + i, *each.shape).double() for i, each in enumerate(parameters)]

    def loss(along: float) -> Tensor:
        with torch.no_grad():
            for parameter, place, way in zip(parameters, start, direction, strict=True):
                parameter.copy_(place + along * way)
        end = ODESolver(lambda x, t, d: velocity(x, t, context), method).walk(x_0, grid)
        return flow_walking(end, x_1, NMSE)

    gradients = torch.autograd.grad(loss(0.0), parameters)
    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, direction, strict=True))
    with torch.no_grad():
        numeric = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=rtol, atol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


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


# The velocity estimator


def flow_of(teacher: Teacher, positions: int, **options: bool) -> tuple[Velocity, AttentionContext]:
    places = torch.arange(positions).expand(2, -1)
    return Velocity(load_layer(teacher, 1), teacher.width, **options), attention_context(
        load_rotary(teacher), places
    )


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"shift": False}, {"time": False}, {"step": True}])
def test_at_the_start_the_velocity_is_the_teachers_layer_minus_identity(teacher, options):
    velocity, context = flow_of(teacher, 7, **options)
    x = 3 * states(0, 2, 7, teacher.width)
    with torch.no_grad():
        expected = load_layer(teacher, 1)(x, context) - x
        for t in (0.0, 0.37, 1.0):
            torch.testing.assert_close(
                velocity(x, torch.full((2,), t), context, d=torch.full((2,), 0.3)),
                expected,
                rtol=1e-4,
                atol=1e-4,
            )


def trained(velocity: Velocity) -> Velocity:
    """With a modulation that is no longer zero."""
    assert velocity.modulation is not None
    nn.init.normal_(velocity.modulation.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return velocity


def test_the_velocity_depends_on_time_once_trained_and_each_sequence_has_its_own(teacher):
    velocity, context = flow_of(teacher, 5)
    trained(velocity)
    x = states(0, 1, 5, teacher.width).expand(2, -1, -1)
    with torch.no_grad():
        at = velocity(x, torch.tensor([0.2, 0.9]), context)
        swapped = velocity(x, torch.tensor([0.9, 0.2]), context)
    assert (at[0] - at[1]).abs().max() > 0.01
    torch.testing.assert_close(at, swapped.flip(0))


def test_a_velocity_that_knows_its_step_depends_on_it(teacher):
    velocity, context = flow_of(teacher, 5, step=True)
    trained(velocity)
    x, t = states(0, 1, 5, teacher.width).expand(2, -1, -1), torch.full((2,), 0.3)
    with torch.no_grad():
        at = velocity(x, t, context, d=torch.tensor([1.0, 0.25]))
    assert (at[0] - at[1]).abs().max() > 0.01
    with pytest.raises(AssertionError, match="knows the step's size"):
        velocity(x, t, context)


def test_the_branches_add_up_to_the_velocity(teacher):
    velocity, context = flow_of(teacher, 5)
    trained(velocity)
    x, t = states(0, 2, 5, teacher.width), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        attention, mlp = velocity.branches(x, t, context)
        torch.testing.assert_close(attention + mlp, velocity(x, t, context))


def test_a_shift_is_predicted_only_where_a_norm_can_take_it_up(teacher):
    velocity, _ = flow_of(teacher, 5)
    assert velocity.shift == (teacher.family.name == "gpt_neox")


def test_the_velocity_sees_no_later_position_and_no_other_piece(teacher):
    velocity, _ = flow_of(teacher, 6)
    trained(velocity)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    context = attention_context(load_rotary(teacher), places)
    x, t = states(0, 1, 6, teacher.width), torch.tensor([0.4])
    changed = x.clone()
    changed[:, 1] += states(9, teacher.width)
    with torch.no_grad():
        difference = (velocity(changed, t, context) - velocity(x, t, context)).abs().amax(-1)[0]
        second = velocity(x[:, 3:], t, attention_context(load_rotary(teacher), torch.arange(3)[None]))
    assert (difference > 1e-4).tolist() == [False, True, True, False, False, False]
    torch.testing.assert_close(velocity(x, t, context)[:, 3:], second, rtol=1e-4, atol=1e-5)


# The closed-form map

NOWHERE = AttentionContext((torch.empty(0), torch.empty(0)), None, torch.empty(0, 0, dtype=torch.long))


def test_least_squares_finds_an_exact_linear_map_whatever_the_batches():
    weight, bias = states(0, 6, 6), states(1, 6)
    x_0 = states(2, 40, 3, 6) * torch.tensor([1e-2, 1, 1, 10, 1e3, 1])
    x_1 = x_0 + x_0 @ weight.T + bias
    solutions = []
    for size in (40, 7):
        sums = LeastSquares(6, 6)
        for some_0, some_1 in zip(x_0.split(size), x_1.split(size), strict=True):
            sums.add(some_0.double(), some_1 - some_0, some_1)
        solutions.append(sums.solve())
    for found in solutions:
        flow = LinearMap(6)
        flow.linear.load_state_dict({"weight": found[0], "bias": found[1]})
        with torch.no_grad():
            reached = ODESolver(lambda x, t, d, flow=flow: flow(x, t, NOWHERE), "euler").sample(x_0, 1)
        assert ErrorScale("token")(reached - x_1, x_1) < 1e-8
    torch.testing.assert_close(solutions[0], solutions[1], rtol=1e-3, atol=1e-5)


def test_least_squares_survives_a_channel_that_never_varies():
    x_0 = states(0, 5, 3, 4)
    x_0[..., 2] = 0
    sums = LeastSquares(4, 4)
    sums.add(x_0, x_0, 2 * x_0)
    weight, bias = sums.solve()
    torch.testing.assert_close(x_0 @ weight.T + bias, x_0, rtol=1e-3, atol=1e-4)
