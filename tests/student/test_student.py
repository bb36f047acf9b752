"""The student is what its parts make it, and a language model like any other of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import greedy, save_run, tokens

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.families.attention import attention_context
from lftpipe.flow.solver import ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.student.derived import student_class
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail
from lftpipe.teacher.trunk import Trunk

ATOL = 1e-4


@pytest.mark.parametrize(("k", "solver"), [(1, "euler"), (3, "midpoint")])
@torch.inference_mode()
def test_logits_are_trunk_then_flow_then_tail(
    teacher: Teacher, run: runs.Run, student: Any, k: int, solver: Any
) -> None:
    ids = tokens(20, sequences=2)
    student.set_steps(k, solver)
    positions = torch.arange(20).expand(2, -1)
    states: dict[int, torch.Tensor] = {}
    Trunk(teacher, 1, torch.float32).run(ids, positions, hidden=states.__setitem__)
    context = attention_context(load_rotary(teacher), positions)
    flow = runs.load_flow(run, teacher)
    x_1 = ODESolver(lambda x, t, d: flow(x, t, context)).sample(states[1], 1 / k, solver)
    torch.testing.assert_close(student(ids).logits, Tail(teacher, 3)(x_1, context), atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("condition", ["source", "step"])
@torch.inference_mode()
def test_a_velocity_is_told_what_it_was_trained_to_see(
    neox_teacher: Teacher, tmp_path: Path, condition: str
) -> None:
    run = save_run(tmp_path / condition, neox_teacher, (1, 3), part={condition: True})
    student = build_student(neox_teacher, [run], steps=2, solver="euler")
    ids, positions = tokens(20, sequences=2), torch.arange(20).expand(2, -1)
    states: dict[int, torch.Tensor] = {}
    Trunk(neox_teacher, 2, torch.float32).run(ids, positions, hidden=states.__setitem__)
    context, flow = attention_context(load_rotary(neox_teacher), positions), runs.load_flow(run, neox_teacher)

    def logits_of(**seen: torch.Tensor) -> torch.Tensor:
        x = states[1]
        for t in (0.0, 0.5):
            x = x + 0.5 * flow(x, torch.full((2,), t), context, **seen)
        return Tail(neox_teacher, 3)(x, context)

    seen = {
        "source": ("source", states[1], states[2]),
        "step": ("step_size", torch.full((2,), 0.5), torch.ones(2)),
    }
    name, right, wrong = seen[condition]
    for _ in range(2):  # the second time from what is remembered
        torch.testing.assert_close(student(ids).logits, logits_of(**{name: right}), atol=ATOL, rtol=1e-4)
    assert (student(ids).logits - logits_of(**{name: wrong})).abs().max() > 100 * ATOL


@torch.inference_mode()
def test_an_untrained_flow_of_one_layer_is_the_teacher(teacher: Teacher, run: runs.Run) -> None:
    layer = Velocity(load_layer(teacher, 1), teacher.width)
    manifest = json.loads((run.path / runs.MANIFEST).read_text()) | {"block": [1, 2]}
    manifest["parts"][0] |= {"start": 1, "stop": 2}
    del manifest["digest"]
    runs.save_run(run.path, layer, manifest)
    student = build_student(teacher, [runs.open_run(run.path)], steps=1, solver="euler")
    ids = tokens(20, sequences=2)
    torch.testing.assert_close(student(ids).logits, load_teacher(teacher)(ids).logits, atol=ATOL, rtol=1e-4)


@torch.inference_mode()
def test_steps_can_be_changed_at_run_time(neox_teacher: Teacher, neox_run: runs.Run) -> None:
    student, ids = build_student(neox_teacher, [neox_run]), tokens(10)
    first = student(ids).logits
    student.set_steps(2, "euler")
    assert student.config.num_hidden_layers == 2 + 2
    other = build_student(neox_teacher, [neox_run], steps=2, solver="euler")
    torch.testing.assert_close(student(ids).logits, other(ids).logits)
    assert torch.equal(greedy(student, ids), greedy(other, ids))
    student.set_steps(3, "midpoint")
    torch.testing.assert_close(student(ids).logits, first)


@torch.inference_mode()
def test_what_depends_on_time_alone_is_computed_once(neox_student: Any) -> None:
    calls = []
    neox_student.student_layers[1].velocity.modulation.register_forward_hook(lambda *_: calls.append(1))
    first = neox_student(tokens(10, sequences=2)).logits
    assert len(calls) == 6
    assert torch.equal(neox_student(tokens(10, sequences=2)).logits, first)
    greedy(neox_student, tokens(10))
    assert len(calls) == 6
    neox_student.set_steps(2, "euler")
    neox_student(tokens(10))
    assert len(calls) == 6 + 2


@pytest.mark.parametrize("how", ["in place", "loaded", "rounded and back"])
def test_what_was_remembered_of_other_weights_is_forgotten(neox_student: Any, how: str) -> None:
    ids, head = tokens(10), neox_student.student_layers[1].velocity.modulation.head

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return neox_student(ids).logits

    before = logits()
    if how == "in place":
        with torch.no_grad():
            head.bias.add_(1)
    elif how == "loaded":
        state = neox_student.state_dict()
        name = "gpt_neox.layers.1.velocity.modulation.head.bias"
        neox_student.load_state_dict(state | {name: state[name] + 1})
    else:
        neox_student.to(torch.bfloat16).to(torch.float32)
    after = logits()
    assert (after - before).abs().max() > 1e-3
    # With gradients nothing is remembered.
    torch.testing.assert_close(after, neox_student(ids).logits, atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize(
    ("steps", "solver", "message"),
    [(0, None, "k = 0 steps"), (True, None, "k = True"), (1, "rk4", "solver 'rk4'")],
)
def test_senseless_steps_are_refused(neox_student: Any, steps: Any, solver: str | None, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        neox_student.set_steps(steps, solver)
    assert (neox_student.config.steps, neox_student.config.solver) == (3, "midpoint")


@torch.inference_mode()
def test_several_blocks(neox_teacher: Teacher, tmp_path: Path) -> None:
    first = save_run(tmp_path / "a", neox_teacher, (0, 2))
    last = save_run(tmp_path / "b", neox_teacher, (2, 4))
    student = build_student(neox_teacher, [last, first])
    assert [block.start for block in student.config.flow_blocks] == [0, 2]
    assert student.config.num_hidden_layers == 12
    assert torch.equal(greedy(student, tokens(5)), greedy(student, tokens(5), use_cache=False))


@pytest.mark.parametrize("part", [{"kind": "layer"}, {"kind": "linear"}])
@torch.inference_mode()
def test_baselines_make_students_too(neox_teacher: Teacher, tmp_path: Path, part: dict[str, Any]) -> None:
    run = save_run(tmp_path / "a", neox_teacher, (0, 3), part=part)
    student = build_student(neox_teacher, [run])
    assert student.config.num_hidden_layers == 2  # one that attends, and perhaps a place that stays empty
    assert torch.equal(greedy(student, tokens(5)), greedy(student, tokens(5), use_cache=False))
    with pytest.raises(RunError, match="k = 1 with euler"):
        build_student(neox_teacher, [run], steps=2)


def test_a_new_flow_is_the_layer_it_was_made_from(neox_teacher: Teacher) -> None:
    kind = student_class("gpt_neox")
    config = kind.config_class(
        **{key: value for key, value in neox_teacher.config.to_dict().items() if key != "model_type"},
        teacher_layers=4,
        blocks=[{"start": 1, "stop": 3, "kind": "flow", "shift": True}],
    )
    model: Any = kind(config)
    assert not model.student_layers[1].velocity.modulation.head.weight.any()


def test_gradients_flow_with_and_without_checkpointing(neox_student: Any) -> None:
    ids = tokens(8, sequences=2)
    gradients = []
    neox_student.requires_grad_(True).train()
    for checkpointing in (False, True):
        if checkpointing:
            neox_student.activation_checkpointing_enable()
        neox_student.zero_grad()
        neox_student(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in neox_student.named_parameters()})
    assert gradients[0]["gpt_neox.layers.1.velocity.modulation.head.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_it_moves_to_other_dtypes(student: Any, dtype: torch.dtype) -> None:
    ids = tokens(8)
    before = student(ids).logits
    after = student.to(dtype)(ids).logits
    assert after.dtype == dtype
    error = (after.double() - before.double()).norm() / before.double().norm()
    assert error < (0.2 if dtype == torch.bfloat16 else 1e-3)
    assert greedy(student, ids).shape == (1, 16)


def test_it_moves_to_other_devices(student: Any) -> None:
    """Whatever it computes with is a parameter or a buffer: nothing stays behind."""
    student.to("meta")
    assert all(value.is_meta for value in [*student.parameters(), *student.buffers()])
    attributes = [value for module in student.modules() for value in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in attributes)


@torch.inference_mode()
def test_hidden_states_and_attentions_are_recorded(neox_student: Any) -> None:
    neox_student.set_attn_implementation("eager")
    output = neox_student(tokens(8), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 1 + 3  # embedding, layer 0, the flow, layer 3 with the final norm
    assert len(output.attentions) == 2 + 6
    neox_student.set_attn_implementation("sdpa")
    torch.testing.assert_close(neox_student(tokens(8)).logits, output.logits, atol=ATOL, rtol=1e-4)


def test_runs_of_different_teachers_or_settings_are_refused(
    neox_teacher: Teacher, teachers: dict[str, Path], tmp_path: Path
) -> None:
    run = save_run(tmp_path / "a", neox_teacher, (0, 2))
    euler = save_run(tmp_path / "b", neox_teacher, (2, 3), solver="euler")
    overlapping = save_run(tmp_path / "c", neox_teacher, (1, 3))
    other = open_teacher(str(teachers["llama"]), tmp_path)
    with pytest.raises(RunError, match="of another teacher"):
        build_student(other, [run])
    with pytest.raises(RunError, match="solver euler and midpoint"):
        build_student(neox_teacher, [run, euler])
    with pytest.raises(SettingsError, match="a student with blocks 0:2, 1:3 / expected: blocks in order"):
        build_student(neox_teacher, [run, overlapping])
    assert build_student(neox_teacher, [run, euler], solver="euler").config.num_hidden_layers == 7


def test_a_student_without_attention_is_refused(neox_teacher: Teacher, tmp_path: Path) -> None:
    part = {"kind": "linear"}
    run = save_run(tmp_path / "a", neox_teacher, (0, 4), part=part)
    with pytest.raises(SettingsError, match="without attention"):
        build_student(neox_teacher, [run])
