"""A student generates as any model of transformers: cached, padded, sampled, by beams."""

from typing import Any

import pytest
import torch
from tiny_students import greedy, tokens

ATOL = 1e-4


@torch.inference_mode()
def test_a_cache_changes_nothing(student: Any) -> None:
    ids = tokens(18, sequences=2)
    whole = student(ids).logits
    cache = student(ids[:, :10], use_cache=True).past_key_values
    assert len(cache.layers) == student.config.num_hidden_layers == 2 + 6
    parts = [student(ids[:, at : at + 1], past_key_values=cache).logits for at in range(10, 18)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 10:], atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static"],
)
def test_cached_generation_equals_uncached(student: Any, options: dict[str, Any]) -> None:
    prompt = tokens(9)
    cached = greedy(student, prompt, **options)
    assert cached.shape == (1, 17)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert torch.equal(cached, greedy(student, prompt, use_cache=False, **options))


def test_sampling_with_a_seed_repeats_itself(neox_student: Any) -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(greedy(neox_student, tokens(5), do_sample=True, top_k=0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@torch.inference_mode()
def test_left_padding_changes_nothing(student: Any) -> None:
    long, short = tokens(12), tokens(7, seed=1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([long, padded]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    together = greedy(student, batch, attention_mask=mask)
    assert torch.equal(together[:1], greedy(student, long))
    assert torch.equal(together[1:, 5:], greedy(student, short))
