"""The velocity estimator: the teacher's layer at first, then a function of time; and the closed-form map."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lftpipe.families.attention import AttentionContext, attention_context
from lftpipe.flow.objective import ErrorScale, flow_walking, walk_times
from lftpipe.flow.part import LeastSquares, LinearMap
from lftpipe.flow.solver import EVALUATIONS, ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.source import Teacher

NMSE = ErrorScale("none")


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
                velocity(x, torch.full((2,), t), context, step_size=torch.full((2,), 0.3)),
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
        at = velocity(x, t, context, step_size=torch.tensor([1.0, 0.25]))
    assert (at[0] - at[1]).abs().max() > 0.01
    with pytest.raises(AssertionError, match="is told the step size"):
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


def test_the_velocity_sees_no_later_position_and_no_other_segment(teacher):
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
    double = lambda each: each.double() if torch.is_tensor(each) and each.is_floating_point() else each  # noqa: E731
    in_double = tree_map(double, dict(context.layers))
    context = replace(context, layers=in_double)
    x_0, x_1 = (states(seed, 2, 6, teacher.width).double() for seed in (0, 1))
    grid = walk_times(torch.tensor([[0.3, 0.5], [0.6, 0.1]]))
    parameters = list(velocity.parameters())
    start = [0.1 * states(i, *each.shape).double() + each.detach() for i, each in enumerate(parameters)]
    direction = [states(100 + i, *each.shape).double() for i, each in enumerate(parameters)]

    def loss(along: float) -> Tensor:
        with torch.no_grad():
            for parameter, place, way in zip(parameters, start, direction, strict=True):
                parameter.copy_(place + along * way)
        end = ODESolver(lambda x, t, d: velocity(x, t, context)).sample(x_0, method=method, time_grid=grid)
        return flow_walking(end, x_1, NMSE)

    gradients = torch.autograd.grad(loss(0.0), parameters)
    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, direction, strict=True))
    with torch.no_grad():
        numeric = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=rtol, atol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


# The closed-form map

NOWHERE = AttentionContext(torch.empty(0, 0, dtype=torch.long), {})


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
            reached = ODESolver(lambda x, t, d, flow=flow: flow(x, t, NOWHERE)).sample(x_0, 1.0, "euler")
        assert ErrorScale("token")(reached - x_1, x_1) < 1e-8
    torch.testing.assert_close(solutions[0], solutions[1], rtol=1e-3, atol=1e-5)


def test_least_squares_survives_a_channel_that_never_varies():
    x_0 = states(0, 5, 3, 4)
    x_0[..., 2] = 0
    sums = LeastSquares(4, 4)
    sums.add(x_0, x_0, 2 * x_0)
    weight, bias = sums.solve()
    torch.testing.assert_close(x_0 @ weight.T + bias, x_0, rtol=1e-3, atol=1e-4)
