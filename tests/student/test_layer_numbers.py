"""What depends on a layer's number when layers are removed, and on the places of a KV cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, LAYERS, make_decoders
from tiny_students import export_settings, greedy, save_run, tokens
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import RunError
from lftpipe.commands import export as command
from lftpipe.commands.export import export
from lftpipe.student import student_class
from lftpipe.student.assemble import build_student, load_model
from lftpipe.student.plain import unroll
from lftpipe.teacher.source import Teacher, open_teacher

SKIP = {"kind": "skip", "shift": False}
LINEAR = {"kind": "linear", "shift": False}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16}


@pytest.fixture
def teacher_of(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a tiny teacher of a model type with these fields in its config."""

    def make(name: str, **fields: Any) -> Teacher:
        monkeypatch.setitem(DECODERS, name, fields)
        return open_teacher(str(make_decoders(tmp_path, [name], tokenizer)[name]), tmp_path)

    return make


@torch.inference_mode()
def test_lists_of_layers_by_their_numbers_follow_the_layers_of_a_plain_form(
    teacher_of: Any, tmp_path: Path
) -> None:
    teacher = teacher_of("qwen3_moe", **EXPERTS, mlp_only_layers=[0, 2])
    student = build_student(teacher, [save_run(tmp_path / "run", teacher, (0, 2), part=SKIP)])
    plain = unroll(student)
    assert plain.config.mlp_only_layers == [0]
    torch.testing.assert_close(plain(tokens(12)).logits, student(tokens(12)).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2}, "layer 1 would be layer 0, with mlp"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"layer 1 would be layer 0, with attn\.scaling"),
    ],
)
def test_a_plain_form_whose_layers_would_be_others_by_their_number_is_refused_in_words(
    teacher_of: Any, tmp_path: Path, name: str, fields: dict[str, Any], what: str
) -> None:
    teacher = teacher_of(name, **fields)
    run = save_run(tmp_path / "run", teacher, (0, 1), part=SKIP)
    with pytest.raises(RunError, match=rf"{what}.* / do: use --form latent-flow"):
        export(export_settings(run, tmp_path, form="plain"))
    assert not (tmp_path / "out").exists()
    export(export_settings(run, tmp_path, form="latent-flow"))
    student = build_student(teacher, [run])
    with torch.inference_mode():
        torch.testing.assert_close(load_model(tmp_path / "out")(tokens(9)).logits, student(tokens(9)).logits)


def test_a_plain_form_with_other_logits_is_refused_and_never_called_exact(
    teacher_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of("qwen2", tie_word_embeddings=True)
    run = save_run(tmp_path / "run", teacher, (1, 3), solver="euler", walk_steps=1)

    def other(student: Any) -> Any:
        plain = unroll(student)
        last = plain.model.layers[2].mlp.down_proj
        last.weight = torch.nn.Parameter(1.05 * last.weight)  # kept layers share the student's tensors
        return plain

    monkeypatch.setattr(command, "unroll", other)
    with pytest.raises(RunError, match=r"logits up to .* off the student's, .* / do: use --form latent"):
        export(export_settings(run, tmp_path, form="plain"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@torch.inference_mode()
def test_a_linear_map_has_a_place_in_the_cache(
    teacher_of: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From layer 0 on, beside a flow, in a cached pass of several tokens."""
    teacher = teacher_of(name, **DECODERS[name])
    linear = save_run(tmp_path / "linear", teacher, (0, 1), part=LINEAR)
    student = build_student(teacher, [linear, save_run(tmp_path / "flow", teacher, (1, 3))])
    assert student.config.num_hidden_layers == 2 + 6
    whole, ids = student(tokens(12)).logits, tokens(12)
    first = student(ids[:, :5], use_cache=True)
    rest = student(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(greedy(student, ids), greedy(student, ids, use_cache=False))


@pytest.mark.parametrize("kind", ["layers", "flow"])
def test_a_student_made_from_its_config_has_all_its_parameters(teacher_of: Any, kind: str) -> None:
    teacher = teacher_of("qwen2")
    block = {"start": 1, "stop": 3, "kind": kind} | ({"depth": 2} if kind == "layers" else {})
    fields = teacher.config.to_dict()
    fields.pop("model_type")
    config = student_class("qwen2").config_class(**fields, teacher_layers=LAYERS, blocks=[block])
    model = AutoModelForCausalLM.from_config(config)
    assert not [name for name, value in model.named_parameters() if value.is_meta]
    weights = [weight.data_ptr() for weight in model.parameters()]
    assert len(set(weights)) == len(weights)
    assert model(tokens(5)).logits.isfinite().all()


def test_weights_that_float16_cannot_hold_are_refused_by_name(teacher_of: Any, tmp_path: Path) -> None:
    teacher = teacher_of("qwen2", tie_word_embeddings=True)
    run = save_run(tmp_path / "run", teacher, (1, 3), solver="euler", walk_steps=1)
    flow = build_student(teacher, [run])
    with torch.no_grad():
        flow.model.layers[0].input_layernorm.weight.fill_(70_000.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "build_student", lambda *_, **__: flow)
        for form in ("plain", "latent-flow"):
            with pytest.raises(
                RunError,
                match=r"tensor model\.layers\.0\.input_layernorm\.weight .* do: pass --dtype bfloat16",
            ):
                export(export_settings(run, tmp_path, form=form, dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_shifts_are_predicted_only_where_both_norms_can_take_them(neox_teacher: Teacher) -> None:
    """A shift of a norm without bias would be lost when the layer is unrolled."""
    from lftpipe.flow.velocity import Velocity
    from lftpipe.teacher.layers import load_layer

    layer = load_layer(neox_teacher, 1)
    assert layer.has_norm_bias
    layer.layer.post_attention_layernorm.bias = None  # pyright: ignore[reportAttributeAccessIssue]
    assert not layer.has_norm_bias
    assert not Velocity(layer, neox_teacher.width).shift
