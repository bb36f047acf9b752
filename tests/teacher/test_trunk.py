"""The trunk's states, attention outputs and the tail's logits are those of transformers' own model."""

import pytest
import torch
from conftest import CONTEXT, VOCABULARY
from teachers import whole
from torch import Tensor

from lftpipe.families.attention import attention_context
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.tail import Tail, count_layer_parameters, count_parameters
from lftpipe.teacher.trunk import Trunk

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def tokens_of(sequences: int, positions: int = CONTEXT) -> Tensor:
    generator = torch.Generator().manual_seed(sequences)
    return torch.randint(VOCABULARY, (sequences, positions), generator=generator)


def places(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def captured(
    trunk: Trunk, tokens: Tensor, position_ids: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Every `h[l]` and `a[l]` that the trunk hands out."""
    h: dict[int, Tensor] = {}
    a: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor]):
        def sink(layer: int, state: Tensor) -> None:
            assert layer not in found, "handed out twice"
            found[layer] = state.clone()

        return sink

    trunk.run(tokens, position_ids, hidden=keep(h), attention=keep(a))
    return h, a


@pytest.fixture(scope="session")
def run(teacher):
    """A teacher, two sequences, all their states by hooks, and transformers' own output."""
    tokens = tokens_of(2)
    position_ids = torch.arange(CONTEXT).expand(2, -1)
    h, a = captured(Trunk(teacher, teacher.num_layers, torch.float32), tokens, position_ids)
    with torch.no_grad():
        output = whole(teacher)(tokens, output_hidden_states=True)
    return teacher, h, a, output, attention_context(load_rotary(teacher), position_ids)


def test_the_hooks_capture_what_transformers_outputs_but_for_the_last_state(run):
    teacher, h, _, output, _ = run
    assert sorted(h) == list(range(teacher.num_layers + 1))
    for layer in range(teacher.num_layers):
        torch.testing.assert_close(h[layer], output.hidden_states[layer], **EXACT)
    last = output.hidden_states[-1]
    assert (h[teacher.num_layers] - last).abs().max() > 0.1  # transformers gives it after the final norm
    norm = Tail(teacher, teacher.num_layers).norm
    torch.testing.assert_close(norm(h[teacher.num_layers]), last, **EXACT)


def test_the_attention_outputs_are_what_each_layer_adds(run):
    teacher, h, a, _, _ = run
    assert sorted(a) == list(range(teacher.num_layers))
    for layer in a:
        parts = load_layer(teacher, layer)
        with torch.no_grad():
            y = h[layer] if parts.parallel else h[layer] + a[layer]
            rest = h[layer + 1] - h[layer] - parts.mlp(parts.mlp_norm(y))
        torch.testing.assert_close(a[layer], rest, rtol=1e-3, atol=1e-4)


def test_branches_are_the_teachers_layer(run):
    teacher, h, a, _, context = run
    for layer in range(teacher.num_layers):
        parts = load_layer(teacher, layer)
        with torch.no_grad():
            torch.testing.assert_close(parts(h[layer], context), h[layer + 1], **EXACT)
            attention = parts.attention(parts.attention_norm(h[layer]), context)
        torch.testing.assert_close(attention, a[layer], **EXACT)


def test_the_tail_gives_the_teachers_own_logits_from_any_state(run):
    teacher, h, _, output, context = run
    for start in range(teacher.num_layers + 1):
        tail = Tail(teacher, start)
        for begin in range(start, teacher.num_layers + 1):
            logits = tail(h[begin], context, start=begin)
            torch.testing.assert_close(logits, output.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Tail(teacher, 1).states(h[1], context, start=1, stop=3), h[3], **EXACT)


@pytest.mark.parametrize("lengths", [(10, 22), (1, 30, 1), (CONTEXT,), (5,) * 6 + (2,)])
def test_a_packed_segment_is_what_the_teacher_computes_on_it_alone(teacher, lengths):
    tokens = tokens_of(1)
    trunk = Trunk(teacher, teacher.num_layers, torch.float32)
    h, a = captured(trunk, tokens, places(*lengths))
    start = 0
    for length in lengths:
        segment = slice(start, start + length)
        h_alone, a_alone = captured(trunk, tokens[:, segment], places(length))
        for layer, state in h_alone.items():
            torch.testing.assert_close(h[layer][:, segment], state, **EXACT)
        for layer, state in a_alone.items():
            torch.testing.assert_close(a[layer][:, segment], state, **EXACT)
        start += length


def test_packed_segments_are_kept_apart_in_every_sequence_of_a_batch(teacher):
    tokens = tokens_of(3)
    position_ids = torch.cat([places(CONTEXT), places(10, 22), places(1, 30, 1)])
    trunk = Trunk(teacher, teacher.num_layers, torch.float32)
    together, _ = captured(trunk, tokens, position_ids)
    context = attention_context(load_rotary(teacher), position_ids)
    for row in range(3):
        alone, _ = captured(trunk, tokens[row : row + 1], position_ids[row : row + 1])
        for layer, state in alone.items():
            torch.testing.assert_close(together[layer][row : row + 1], state, **EXACT)
    with torch.no_grad():  # and a single layer, as training and evaluation run it, does the same
        torch.testing.assert_close(load_layer(teacher, 0)(together[0], context), together[1], **EXACT)


def calls_of(model: torch.nn.Module) -> list[str]:
    """Names of the modules that run, as they run."""
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("deepest", [1, 2, 4])
def test_the_trunk_stops_after_the_deepest_state_and_has_no_head(teacher, deepest):
    trunk = Trunk(teacher, deepest, torch.float32)
    calls = calls_of(trunk.model)
    h, a = captured(trunk, tokens_of(1), places(CONTEXT))
    assert sorted(h) == list(range(deepest + 1))
    assert sorted(a) == list(range(deepest))
    layers = [name for name in calls if name.startswith("layers.") and name.count(".") == 1]
    assert layers == [f"layers.{index}" for index in range(deepest)]
    names = [name for name, _ in trunk.model.named_parameters()]
    assert not any("head" in name or "embed_out" in name for name in names)
    assert trunk.num_parameters == VOCABULARY * 32 + deepest * count_layer_parameters(teacher)
    deeper, _ = captured(Trunk(teacher, 4, torch.float32), tokens_of(1), places(CONTEXT))
    torch.testing.assert_close(h[deepest], deeper[deepest], **EXACT)


def test_the_first_state_alone_is_the_embedding(neox_teacher):
    h, a = captured(Trunk(neox_teacher, 0, torch.float32), tokens_of(1), places(CONTEXT))
    assert sorted(h) == [0]
    assert a.keys() <= {0}
    weight = neox_teacher.checkpoint.read(["gpt_neox.embed_in.weight"])["gpt_neox.embed_in.weight"]
    torch.testing.assert_close(h[0], weight[tokens_of(1)])


def test_in_bfloat16_the_residual_stays_in_float32_and_near(teacher):
    exact, _ = captured(Trunk(teacher, 4, torch.float32), tokens_of(1), places(CONTEXT))
    rough, _ = captured(Trunk(teacher, 4, torch.bfloat16), tokens_of(1), places(CONTEXT))
    for layer, state in exact.items():
        assert rough[layer].dtype == torch.float32
        assert (rough[layer] - state).square().sum() < 1e-3 * state.square().sum()
    assert not torch.equal(rough[4], exact[4])


def test_parameters_are_counted_as_the_model_has_them(teacher):
    model = whole(teacher)
    assert count_parameters(teacher) == sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    assert count_layer_parameters(teacher) == layer
