from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lftpipe.base.errors import SettingsError
from lftpipe.config.loss import TERMS, parse_loss, stage_starts
from lftpipe.flow.distillation import full_divergence, top_divergence
from lftpipe.flow.objective import ErrorScale, branch_matching
from lftpipe.training.terms import TERMS as COMPUTED


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The language


def test_a_loss_is_a_weighted_sum_in_stages():
    (one,) = parse_loss("fw")
    assert (one.fraction, one.weights) == (1.0, {"fw": 1.0})
    first, second = parse_loss("fw@0.7 / fw:0.1, logits")
    assert (first.fraction, first.weights) == (0.7, {"fw": 1.0})
    assert second.fraction == pytest.approx(0.3)
    assert second.weights == {"fw": 0.1, "logits": 1.0}
    assert [stage.fraction for stage in parse_loss("sfm/fw@0.5/logits")] == [0.25, 0.5, 0.25]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 500))
def test_stages_follow_each_other_and_end_with_the_last_step(parts, num_steps):
    text = "/".join(f"fw@{part / sum(parts)!r}" for part in parts)
    starts = stage_starts(parse_loss(text), num_steps)
    assert (starts[0], starts[-1], len(starts)) == (0, num_steps, len(parts) + 1)
    assert list(starts) == sorted(starts)
    for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
        assert abs((stop - start) - num_steps * part / sum(parts)) <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fv", r"'fv' in --loss fv / expected: one of fw, sfm"),
        ("", r"'' in --loss / expected: one of"),
        ("fw,fw:2", r"fw twice in --loss .* / do: add up its weights"),
        ("fw:0", r"'0' in --loss fw:0 / expected: a positive number"),
        ("fw:-1", r"'-1' in --loss"),
        ("fw:nan", r"'nan' in --loss"),
        ("fw:1e999", r"'1e999' in --loss"),
        ("fw:0.5@1e999", r"'1e999' in --loss"),
        ("fw@0.7/logits@0.7", r"whose fractions add up to 1.4 / expected: 1"),
        ("fw@0.5", r"whose fractions add up to 0.5"),
        ("fw@1/logits", r"whose fractions add up to 1 "),
    ],
)
def test_what_is_no_loss_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_loss(text)


def test_every_term_of_the_language_can_be_computed():
    assert COMPUTED.keys() == TERMS.keys()


# Distributions


@given(st.integers(1, 12), st.integers(0, 1000))
def test_the_largest_logits_bound_the_divergence_from_below(kept, seed):
    teacher, student = 3 * random(seed, 2, 3, 12), 3 * random(seed + 1, 2, 3, 12)
    values, ids = teacher.topk(kept)
    bound = top_divergence(values, ids, teacher.logsumexp(-1), student)
    whole = full_divergence(teacher, student)
    # What 1 minus a sum leaves of the rest is right to 1e-6 in float32; its logarithm is 16 at most.
    assert -1e-5 <= bound <= whole + 3e-5
    if kept == 12:
        torch.testing.assert_close(bound, whole, rtol=1e-4, atol=1e-5)


def test_a_divergence_is_zero_for_equal_distributions_and_has_no_gradient_there():
    teacher = random(0, 2, 5, 9)
    values, ids = teacher.topk(4)
    for loss in (
        lambda student: full_divergence(teacher, student),
        lambda student: top_divergence(values, ids, teacher.logsumexp(-1), student),
    ):
        student = (teacher + 7).requires_grad_(True)  # a constant changes no probability
        value = loss(student)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.abs() < 1e-5
        assert gradient.abs().max() < 1e-5


# Branches


def test_branches_that_carry_their_own_parts_have_no_loss_and_swapped_ones_have():
    attention, mlp, x_1 = (random(seed, 2, 3, 4) for seed in range(3))
    scale = ErrorScale("token")
    assert branch_matching((attention, mlp), (attention, mlp), x_1, scale) == 0
    assert branch_matching((mlp, attention), (attention, mlp), x_1, scale) > 0.1
