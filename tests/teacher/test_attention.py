"""Attention in blocks is torch's attention, to the accuracy of bfloat16."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lftpipe.families.attention import BLOCK, AttentionContext, attention, attention_context, causal_attention
from lftpipe.teacher.layers import load_layer, load_rotary

#: bfloat16 keeps eight bits: what one rounding loses at most, relatively.
ROUNDING = 2.0**-8


def heads(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def segments(positions: int, *starts: int) -> Tensor:
    """The mask of one sequence of several segments."""
    segment = torch.zeros(positions, dtype=torch.long)
    segment[list(starts)] = 1
    segment = segment.cumsum(0)
    return ((segment[:, None] == segment) & torch.ones(positions, positions, dtype=torch.bool).tril())[
        None, None
    ]


@pytest.mark.parametrize("positions", [3, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_torch(positions, kv_heads, packed):
    mask = segments(positions, positions // 3 + 1) if packed else None
    query = heads(0, 2, 6, positions, 16).requires_grad_()
    key, value = (heads(seed, 2, kv_heads, positions, 16).requires_grad_() for seed in (1, 2))
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=0.3
    )
    found = causal_attention(query, key, value, mask, scaling=0.3).transpose(1, 2)
    assert found.shape == expected.shape
    assert error(found, expected) < 2 * ROUNDING
    direction = heads(3, *expected.shape)
    wanted = torch.autograd.grad(expected, (query, key, value), direction)
    for got, want in zip(torch.autograd.grad(found, (query, key, value), direction), wanted, strict=True):
        assert error(got, want) < 4 * ROUNDING


def test_a_mask_to_add_is_a_mask_of_truths():
    mask = segments(BLOCK + 7, 20)
    query, key, value = (heads(seed, 1, 2, BLOCK + 7, 8) for seed in range(3))
    to_add = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(causal_attention(query, key, value, mask), causal_attention(query, key, value, to_add))


def test_no_position_sees_a_later_one_or_another_segment():
    mask = segments(2 * BLOCK, 150)
    query, key, value = (heads(seed, 1, 2, 2 * BLOCK, 8) for seed in range(3))
    before = causal_attention(query, key, value, mask)
    key[:, :, 200:], value[:, :, 200:] = 9.0, -9.0
    key[:, :, :50], value[:, :, :50] = 9.0, -9.0
    after = causal_attention(query, key, value, mask)
    same = (before == after).all(-1).all(-1)[0]
    assert not same[:150].any()
    assert same[150:200].all()
    assert not same[200:].any()


def test_only_bfloat16_is_computed_in_blocks(monkeypatch):
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return causal_attention(*given)

    monkeypatch.setattr("lftpipe.families.attention.causal_attention", counted)
    module = torch.nn.Module()
    module.is_causal = True
    token, whole = (heads(0, 1, 2, positions, 8) for positions in (1, 9))
    attention(module, whole, whole, whole, None, scaling=0.3, dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        attention(module, token, whole, whole, None, scaling=0.3, dropout=0.0)
        attention(module, whole, whole, whole, None, scaling=0.3, dropout=0.1)
        attention(module, whole, whole, whole, None, scaling=0.3, sliding_window=4)
        assert not calls
        attention(module, whole, whole, whole, None, scaling=0.3, dropout=0.0)
    assert calls == [1]


def test_layers_in_bfloat16_are_as_exact_as_with_torch_s_attention(teacher, monkeypatch):
    layer, x = load_layer(teacher, 1), heads(0, 2, 40, teacher.width)
    context: AttentionContext = attention_context(load_rotary(teacher), torch.arange(40).remainder(25)[None])
    exact = layer(x, context)
    errors = []
    for in_blocks in (True, False):
        if not in_blocks:
            monkeypatch.setattr("lftpipe.families.attention._in_blocks", lambda *given: False)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(error(layer(x, context) - x, exact - x))
    assert 0 < errors[0] < 1.5 * errors[1]
    assert math.isfinite(errors[1])
