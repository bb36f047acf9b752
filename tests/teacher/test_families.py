"""The laws of teachers, on families whose interface is derived from the structure of their models."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import randomise
from decoders import DECODERS, FAMILIES, LATE, LAYERS, VOCABULARY, WHOLE, config_of, make_decoders
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lftpipe.base.errors import TeacherError
from lftpipe.families.attention import AttentionContext, attention_context
from lftpipe.families.branches import Branches
from lftpipe.families.structure import check_attention
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail, count_parameters
from lftpipe.teacher.trunk import Trunk

EXACT = {"rtol": 1e-4, "atol": 1e-5}
CONTEXT, SECOND = 16, 9
States = dict[int, Tensor]


class Case(NamedTuple):
    """A teacher of one family, two sequences of two segments each, and all that flows through it."""

    name: str
    teacher: Teacher
    model: Any
    tokens: Tensor
    places: Tensor
    trunk: Trunk
    hidden: States
    attention: States

    def context(self, places: Tensor) -> AttentionContext:
        return attention_context(load_rotary(self.teacher), places)


def captured(trunk: Trunk, tokens: Tensor, places: Tensor) -> tuple[States, States]:
    hidden: States = {}
    attention: States = {}
    trunk.run(
        tokens,
        places,
        hidden=lambda layer, state: hidden.update({layer: state.clone()}),
        attention=lambda layer, state: attention.update({layer: state.clone()}),
    )
    return hidden, attention


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast) -> Case:
    name = request.param
    folder = tmp_path_factory.mktemp("families") / name
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    randomise(model)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teacher = open_teacher(str(folder), Path("unused"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, CONTEXT), generator=generator)
    places = torch.cat([torch.arange(SECOND), torch.arange(CONTEXT - SECOND)]).expand(2, -1)
    trunk = Trunk(teacher, LAYERS, torch.float32)
    return Case(name, teacher, model, tokens, places, trunk, *captured(trunk, tokens, places))


@torch.inference_mode()
def test_states_are_what_transformers_hands_out(case: Case) -> None:
    whole = torch.arange(CONTEXT).expand(2, -1)
    hidden, _ = captured(case.trunk, case.tokens, whole)
    theirs = case.model(case.tokens, output_hidden_states=True).hidden_states
    first = case.name in LATE
    assert sorted(hidden) == list(range(LAYERS + 1))
    for layer in range(first, LAYERS):
        torch.testing.assert_close(hidden[layer], theirs[layer - first], **EXACT)


def test_a_segment_is_what_the_teacher_computes_on_it_alone(case: Case) -> None:
    for span in (slice(0, SECOND), slice(SECOND, CONTEXT)):
        alone, attention = captured(case.trunk, case.tokens[:, span], case.places[:, span])
        for layer, state in alone.items():
            torch.testing.assert_close(case.hidden[layer][:, span], state, **EXACT)
        for layer, state in attention.items():
            torch.testing.assert_close(case.attention[layer][:, span], state, **EXACT)


@torch.inference_mode()
def test_the_tail_gives_the_models_own_logits_from_any_state(case: Case) -> None:
    places = torch.arange(CONTEXT).expand(2, -1)
    hidden, _ = captured(case.trunk, case.tokens, places)
    logits = case.model(case.tokens).logits
    tail, context = Tail(case.teacher, 0), case.context(places)
    for start in range(LAYERS + 1):
        torch.testing.assert_close(tail(hidden[start], context, start=start), logits, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_single_layers_carry_packed_states_on(case: Case) -> None:
    context = case.context(case.places)
    for layer in range(LAYERS):
        after = load_layer(case.teacher, layer)(case.hidden[layer], context)
        torch.testing.assert_close(after, case.hidden[layer + 1], **EXACT)


@torch.inference_mode()
def test_the_untrained_velocity_is_the_layer_minus_identity(case: Case) -> None:
    for layer in range(LAYERS):
        velocity = Velocity(load_layer(case.teacher, layer), case.teacher.width)
        x = case.hidden[layer]
        change = velocity(x, torch.full((2,), 0.3), case.context(case.places))
        torch.testing.assert_close(x + change, case.hidden[layer + 1], **EXACT)
        plain = Velocity(load_layer(case.teacher, layer), case.teacher.width, time=False)
        assert torch.equal(plain(x, torch.zeros(2), case.context(case.places)), change)


def test_gradients_reach_every_part_of_the_velocity(case: Case) -> None:
    velocity = Velocity(load_layer(case.teacher, 1), case.teacher.width).requires_grad_(True)
    x, context = case.hidden[1].clone(), case.context(case.places)
    velocity(x, torch.full((2,), 0.3), context).square().sum().backward()
    assert velocity.modulation is not None
    assert velocity.modulation.head.weight.grad is not None
    assert velocity.modulation.head.weight.grad.abs().sum() > 0


@torch.inference_mode()
def test_attention_outputs_are_what_is_added_to_the_stream(case: Case) -> None:
    whole = WHOLE.get(case.name, range(0))
    assert sorted(case.attention) == [layer for layer in range(LAYERS) if layer not in whole]
    if whole:
        with pytest.raises(TeacherError, match=r"layer 0 adds none .* / do: pass --no-attention"):
            check_attention(case.name, case.teacher.family, case.teacher.config, (0, 1))
    context = case.context(case.places)
    for layer in case.attention:
        parts = load_layer(case.teacher, layer)
        x, a = case.hidden[layer], case.attention[layer]
        rest = case.hidden[layer + 1] - x - parts.mlp(parts.mlp_norm(x + a), context)
        torch.testing.assert_close(a, rest, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_context_of_some_rows_is_theirs(case: Case) -> None:
    places = torch.stack([torch.arange(CONTEXT), case.places[0]])
    x = case.hidden[1]
    layer = load_layer(case.teacher, 1)
    both = layer(x, case.context(places))
    for row in range(2):
        alone = layer(x[row : row + 1], case.context(places).rows(slice(row, row + 1)))
        torch.testing.assert_close(both[row : row + 1], alone, **EXACT)


def test_parameters_are_counted_as_the_model_has_them(case: Case) -> None:
    assert count_parameters(case.teacher) == sum(each.numel() for each in case.model.parameters())


def test_a_state_above_is_not_loaded(case: Case) -> None:
    trunk = Trunk(case.teacher, 2, torch.float32)
    hidden, _ = captured(trunk, case.tokens, case.places)
    assert sorted(hidden) == [0, 1, 2]
    torch.testing.assert_close(hidden[2], case.hidden[2], **EXACT)
    assert trunk.num_parameters < Trunk(case.teacher, LAYERS, torch.float32).num_parameters


def test_branches_that_do_not_make_the_layer_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if load_layer(case.teacher, 1).whole:
        return
    monkeypatch.setattr(Branches, "mlp", lambda self, x, context=None: torch.zeros_like(x))
    with pytest.raises(TeacherError, match="whose two branches do not make its output"):
        load_layer(case.teacher, 1)


@torch.inference_mode()
def test_what_looks_at_the_length_of_a_call_is_computed_on_each_segment_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longrope takes other factors for the whole batch once one of its sequences is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 4.0, 6.0],
        "original_max_position_embeddings": 8,
    }
    fields = {"rope_parameters": rope, "original_max_position_embeddings": 8}
    monkeypatch.setitem(DECODERS, "phi3", fields)
    teacher = open_teacher(str(make_decoders(tmp_path, ["phi3"], tokenizer)["phi3"]), tmp_path)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, CONTEXT), generator=generator)
    whole, two = torch.arange(CONTEXT), torch.cat([torch.arange(5), torch.arange(CONTEXT - 5)])
    places = torch.stack([whole, two])
    trunk = Trunk(teacher, LAYERS, torch.float32)
    hidden, _ = captured(trunk, tokens, places)
    context = attention_context(load_rotary(teacher), places)
    for row, span in ((0, slice(0, CONTEXT)), (1, slice(0, 5)), (1, slice(5, CONTEXT))):
        alone, _ = captured(trunk, tokens[row : row + 1, span], places[row : row + 1, span])
        for layer, state in alone.items():
            torch.testing.assert_close(hidden[layer][row : row + 1, span], state, **EXACT)
            if layer < LAYERS:
                after = load_layer(teacher, layer)(hidden[layer], context)
                torch.testing.assert_close(after[row : row + 1, span], alone[layer + 1], **EXACT)
    short = torch.cat([torch.arange(8), torch.arange(8)]).expand(2, -1)
    assert not attention_context(load_rotary(teacher), short).apart  # nothing here is long
