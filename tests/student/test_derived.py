"""Students of derived families: what their parts make them, and language models like any other."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from decoders import DECODERS, FAMILIES, LATE, LAYERS, make_decoders
from tiny_students import save_run, tokens
from transformers import PreTrainedTokenizerFast

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.families.attention import attention_context
from lftpipe.flow.solver import ODESolver
from lftpipe.student.assemble import build_student, load_model, load_teacher, without_layers
from lftpipe.student.decoding import continue_prompt, speculate
from lftpipe.student.plain import unroll
from lftpipe.teacher.layers import load_rotary
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail, count_layer_parameters
from lftpipe.teacher.trunk import Trunk

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
COUNT = 12


class Case(NamedTuple):
    """A tiny teacher and a run of a random flow for two of its layers."""

    name: str
    teacher: Teacher
    run: runs.Run


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast) -> Case:
    name, root = request.param, tmp_path_factory.mktemp("derived")
    folder = make_decoders(root, [name], tokenizer)[name]
    teacher = open_teacher(str(folder), Path("unused"))
    return Case(name, teacher, save_run(root / "run", teacher, (1, 3)))


def written(student: Any, **options: Any) -> torch.Tensor:
    prompt = tokens(9)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return student.generate(prompt, **options)


@pytest.mark.parametrize(("k", "solver"), [(1, "euler"), (2, "midpoint")])
@torch.inference_mode()
def test_logits_are_trunk_then_flow_then_tail(case: Case, k: int, solver: Any) -> None:
    student = build_student(case.teacher, [case.run])
    student.set_steps(k, solver)
    ids, places = tokens(COUNT, sequences=2), torch.arange(COUNT).expand(2, -1)
    states: dict[int, torch.Tensor] = {}
    Trunk(case.teacher, 2, torch.float32).run(ids, places, hidden=states.__setitem__)
    context = attention_context(load_rotary(case.teacher), places)
    flow = runs.load_flow(case.run, case.teacher)
    x_1 = ODESolver(lambda x, t, step: flow(x, t, context)).sample(states[1], 1 / k, solver)
    torch.testing.assert_close(student(ids).logits, Tail(case.teacher, 3)(x_1, context), **CLOSE)


@torch.inference_mode()
def test_generation_from_a_cache_is_generation_without(case: Case) -> None:
    student = build_student(case.teacher, [case.run], steps=2, solver="midpoint")
    assert len(student.config.places()) == LAYERS - 1
    assert student.config.num_hidden_layers == LAYERS - 2 + 4
    cached = written(student)
    assert cached.shape == (1, 15)
    assert torch.equal(cached, written(student, use_cache=False))


@torch.inference_mode()
def test_a_saved_student_is_loaded_as_it_was(case: Case, tmp_path: Path) -> None:
    student = build_student(case.teacher, [case.run], steps=2, solver="euler")
    student.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    assert back.config.model_type == f"latent_flow_{case.name}"
    ids = tokens(COUNT)
    torch.testing.assert_close(back(ids).logits, student(ids).logits, **CLOSE)
    assert torch.equal(written(back), written(student))


#: Families whose flows fold exactly into their own ordinary layers, with one step of Euler's.
FOLDING = [name for name in DECODERS if name not in ("mixtral", "mamba2")]


@torch.inference_mode()
def test_one_step_unrolls_to_the_family_itself_where_it_folds(case: Case) -> None:
    student = build_student(case.teacher, [case.run], steps=1, solver="euler")
    if case.name not in FOLDING:
        with pytest.raises(RunError, match="use --form latent-flow"):
            unroll(student)
        return
    plain = unroll(student)
    assert plain.config.model_type == case.name
    assert plain.config.num_hidden_layers == LAYERS - 1
    ids = tokens(COUNT)
    torch.testing.assert_close(plain(ids).logits, student(ids).logits, **CLOSE)
    with pytest.raises(RunError, match="k = 1"):
        unroll(build_student(case.teacher, [case.run], steps=2, solver="euler"))


@torch.inference_mode()
def test_a_draft_writes_ahead_where_the_teacher_can_take_back(
    case: Case, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher, draft = load_teacher(case.teacher), build_student(case.teacher, [case.run])
    if case.name in LATE:
        with pytest.raises(SettingsError, match="can take back tokens"):
            speculate(teacher, draft, tokenizer, "a b", 6)
        return
    alone = continue_prompt(teacher, tokenizer, "a b", 6)
    assert speculate(teacher, draft, tokenizer, "a b", 6).continuation.tokens == alone.tokens


@torch.inference_mode()
def test_layers_of_several_kinds_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts whose second layer has none."""
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    monkeypatch.setitem(DECODERS, "qwen2_moe", experts | {"mlp_only_layers": [1]})
    teacher = open_teacher(
        str(make_decoders(tmp_path, ["qwen2_moe"], tokenizer)["qwen2_moe"]), Path("unused")
    )
    model, ids = load_teacher(teacher), tokens(COUNT)
    draft = without_layers(model, teacher, [(0, 1)])
    assert draft.config.num_hidden_layers == LAYERS - 1
    assert draft.model.layers[0].mlp.down_proj.weight is model.model.layers[1].mlp.down_proj.weight
    assert [each.self_attn.layer_idx for each in draft.model.layers] == list(range(LAYERS - 1))
    assert len(model.model.layers) == LAYERS
    counted = [count_layer_parameters(teacher, index) for index in range(LAYERS)]
    assert counted == [sum(each.numel() for each in layer.parameters()) for layer in model.model.layers]
    assert counted[0] != counted[1]
    states = model.model.embed_tokens(ids)
    places = model.model.rotary_emb(states, torch.arange(COUNT)[None])
    for layer in model.model.layers[1:]:
        states = layer(states, position_embeddings=places)
        states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(draft(ids).logits, model.lm_head(model.model.norm(states)), **CLOSE)
    assert speculate(model, draft, tokenizer, "a b", 6).continuation.tokens
