import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lftpipe.evaluation.metrics import LogitMetrics, NextTokens, Reference, StateMetrics, kl_divergence


def random(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_of(*rows: str) -> Tensor:
    """`"x..x."` marks the first positions of segments."""
    return torch.tensor([[character == "x" for character in row] for row in rows])


FIRST = first_of("x..x.", "x....", "xx...")


def scored(predicted: Tensor, x_1: Tensor, first: Tensor, split: int = 99) -> StateMetrics:
    metrics = StateMetrics()
    for part in zip(predicted.split(split), x_1.split(split), first.split(split), strict=True):
        metrics.add(*part)
    return metrics


def logit_scored(
    student: Tensor, teacher: Tensor, tokens: Tensor, first: Tensor, split: int = 99
) -> LogitMetrics:
    metrics = LogitMetrics()
    for some, of, ids, starts in zip(
        *(each.split(split) for each in (student, teacher, tokens, first)), strict=True
    ):
        metrics.add(some.flatten(0, 1), Reference.of(of.flatten(0, 1)), NextTokens.of(ids, starts))
    return metrics


@given(st.integers(0, 1000))
def test_the_metrics_of_states_are_their_definitions(seed):
    x_1, predicted = random(seed, 3, 5, 4), random(seed + 1, 3, 5, 4)
    metrics = scored(predicted, x_1, FIRST)
    error, energy = (predicted - x_1).square().sum(-1), x_1.square().sum(-1)
    assert metrics.nmse == pytest.approx((error.mean() / energy.mean()).item(), rel=1e-5)
    rest = ~FIRST
    assert metrics.nmse_without_first == pytest.approx(
        (error[rest].mean() / energy[rest].mean()).item(), rel=1e-5
    )
    p, q = x_1.softmax(-1), predicted.softmax(-1)
    assert metrics.kl_latent == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


@given(st.integers(0, 1000))
def test_the_metrics_of_logits_are_their_definitions(seed):
    teacher, student = random(seed, 3, 5, 7), random(seed + 1, 3, 5, 7)
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(seed))
    metrics = logit_scored(student, teacher, tokens, FIRST)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert metrics.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    nats = [
        -q[sequence, position - 1, tokens[sequence, position]].log().item()
        for sequence in range(3)
        for position in range(1, 5)
        if not FIRST[sequence, position]
    ]
    assert metrics.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


def test_products_in_bfloat16_leave_the_metrics_in_float32():
    teacher, student = 5 * random(0, 3, 5, 7), 5 * random(1, 3, 5, 7)
    tokens = torch.zeros(3, 5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        metrics = logit_scored(student, teacher, tokens, FIRST)
    np.testing.assert_array_equal(
        metrics.by_document(), logit_scored(student, teacher, tokens, FIRST).by_document()
    )


@given(st.integers(0, 100), st.integers(1, 3))
def test_batches_do_not_matter(seed, split):
    x_1, predicted = random(seed, 3, 5, 4), random(seed + 1, 3, 5, 4)
    some, all_ = scored(predicted, x_1, FIRST, split), scored(predicted, x_1, FIRST)
    tokens = torch.zeros(3, 5, dtype=torch.long)
    some_logits, all_logits = (logit_scored(predicted, x_1, tokens, FIRST, each) for each in (split, 99))
    assert (some.nmse, some.nmse_without_first, some.kl_latent) == pytest.approx(
        (all_.nmse, all_.nmse_without_first, all_.kl_latent)
    )
    assert (some_logits.kl, some_logits.perplexity) == pytest.approx((all_logits.kl, all_logits.perplexity))


def test_identical_states_and_logits_have_no_distance():
    x = random(0, 3, 5, 4)
    metrics = scored(x, x, FIRST)
    assert (metrics.nmse, metrics.nmse_without_first, metrics.kl_latent) == (0, 0, 0)
    tokens = torch.zeros(3, 5, dtype=torch.long)
    assert logit_scored(x, x, tokens, FIRST).kl == pytest.approx(0, abs=1e-6)


def test_a_uniform_student_has_the_perplexity_of_its_vocabulary():
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    metrics = logit_scored(torch.zeros(3, 5, 11), torch.zeros(3, 5, 11), tokens, FIRST)
    assert metrics.perplexity == pytest.approx(11)
    assert metrics.by_document()[3].sum() == 4 * 3 - 2  # what starts a segment is no target


def test_a_massive_first_position_rules_the_nmse_and_not_the_one_without_it():
    x_1 = random(0, 3, 5, 4)
    x_1[FIRST] = 1e4
    predicted = x_1.clone()
    predicted[~FIRST] = 0
    metrics = scored(predicted, x_1, FIRST)
    assert metrics.nmse < 1e-6
    assert metrics.nmse_without_first == pytest.approx(1)


@given(st.integers(0, 100), st.floats(-50, 50))
def test_kl_is_never_negative_and_knows_no_offset(seed, offset):
    p, q = random(seed, 6, 4), random(seed + 1, 6, 4)
    assert (kl_divergence(p, q) > 0).all()
    torch.testing.assert_close(kl_divergence(p + offset, q), kl_divergence(p, q), rtol=1e-3, atol=1e-4)


def test_half_precision_is_summed_in_full():
    x_1 = torch.full((3, 5, 4096), 100.0, dtype=torch.float16)  # squares and sums overflow float16
    metrics = scored(x_1 * 0, x_1, FIRST)
    assert metrics.nmse == pytest.approx(1)
    assert math.isfinite(metrics.read()[1])
