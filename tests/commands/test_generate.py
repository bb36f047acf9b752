"""`lftpipe generate`: what streams, what is measured, and that a draft never changes the text."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import save_run
from typer.testing import CliRunner

from lftpipe import runs
from lftpipe.base.errors import RunError, SettingsError
from lftpipe.cli.app import app
from lftpipe.commands.export import export
from lftpipe.commands.generate import generate, summary
from lftpipe.config.settings import ExportSettings, GenerateSettings
from lftpipe.results.run import read_samples
from lftpipe.student.assemble import build_student, load_teacher, without_layers
from lftpipe.student.decoding import continue_prompt, speculate
from lftpipe.teacher.source import Teacher, open_teacher

PROMPT = "the state of a layer flows into"


@pytest.fixture
def run(teacher: Teacher, tmp_path: Path) -> runs.Run:
    return save_run(tmp_path / "tiny" / "runs" / "flow", teacher, (1, 3), solver="euler")


@pytest.fixture
def neox_run(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    return save_run(tmp_path / "tiny" / "runs" / "flow", neox_teacher, (1, 3), solver="euler")


def settings(tmp_path: Path, **options: Any) -> GenerateSettings:
    return GenerateSettings(workspace=tmp_path, **({"prompt": PROMPT, "max_new_tokens": 12} | options))


def test_a_run_by_name_continues_the_prompt(run: runs.Run, tmp_path: Path) -> None:
    out = io.StringIO()
    result = generate(settings(tmp_path, target="flow"), out)
    assert out.getvalue() == PROMPT + result["text"] + "\n"
    assert (result["k"], result["solver"], result["nfe"]) == (3, "euler", 3)
    assert 0 < result["new_tokens"] <= 12
    assert 0 < result["first_token_seconds"] <= result["seconds"]
    assert result["tokens_per_second"] == pytest.approx(result["new_tokens"] / result["seconds"], rel=0.05)
    assert "3 euler steps" in str(summary(result))
    assert json.loads(json.dumps(result.to_json())) == dict(result)


@pytest.mark.parametrize("name", ["run [1] a", "*", "a?", "[a]", "flow"])
def test_the_name_of_a_run_is_never_a_pattern(neox_run: runs.Run, tmp_path: Path, name: str) -> None:
    neox_run.path.rename(neox_run.path.parent / name)
    save_run(neox_run.path.parent / "ab", open_teacher(neox_run.teacher["model"], tmp_path), (1, 3))
    assert generate(settings(tmp_path, target=name))["model"].endswith(f"runs/{name}")
    for other in ("a*", "[ab]b", "a?"):
        if other != name:
            with pytest.raises(RunError, match=f"given: no run {re.escape(other)} in "):
                generate(settings(tmp_path, target=other))


def test_exports_write_what_the_run_writes(neox_run: runs.Run, tmp_path: Path) -> None:
    text = generate(settings(tmp_path, target="flow", k=2))["text"]
    for form in ("plain", "latent-flow"):
        folder = tmp_path / form
        export(ExportSettings(workspace=tmp_path, runs=("flow",), k=2, form=form, out=folder))  # pyright: ignore
        result = generate(settings(tmp_path, target=str(folder)))
        assert result["text"] == text
        assert result["k"] == (2 if form == "latent-flow" else None)


def test_steps_and_solver_of_an_exported_student_can_be_changed(neox_run: runs.Run, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export(ExportSettings(workspace=tmp_path, runs=("flow",), k=2, out=folder))
    result = generate(settings(tmp_path, target=str(folder), k=3, solver="midpoint"))
    assert result["nfe"] == 6
    assert result["text"] == generate(settings(tmp_path, target="flow", solver="midpoint"))["text"]


def test_sampling_is_decided_by_the_seed(neox_run: runs.Run, tmp_path: Path) -> None:
    texts = [
        generate(settings(tmp_path, target="flow", temperature=2.0, seed=seed))["text"] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_compare_shows_the_teacher_beside_the_student(neox_run: runs.Run, tmp_path: Path) -> None:
    export(ExportSettings(workspace=tmp_path, runs=("flow",), out=tmp_path / "exported"))
    for target in ("flow", str(tmp_path / "exported")):
        result = generate(settings(tmp_path, target=target, compare=True))
        theirs = result["teacher"]
        assert theirs["model"] == "neox"
        assert result["text"] != theirs["text"]
        assert 0 <= result["common_tokens"] < 12
        table: Any = summary(result)
        assert [theirs["text"], result["text"]] == [next(iter(column.cells)) for column in table.columns]


def test_kept_texts_are_read_again_and_asking_again_replaces_them(neox_run: runs.Run, tmp_path: Path) -> None:
    for prompt in (PROMPT, "return self", PROMPT):
        result = generate(settings(tmp_path, target="flow", keep=True, prompt=prompt))
    assert result["kept"] == str(neox_run.path / "samples.jsonl")
    samples, damage = read_samples(Path(result["kept"]))
    assert damage == []
    assert [sample.prompt for sample in samples] == ["return self", PROMPT]
    assert (samples[1].student_text, samples[1].teacher_text) == (result["text"], result["teacher"]["text"])
    assert (samples[1].run, samples[1].k, samples[1].solver) == ("flow", 3, "euler")
    assert "samples.jsonl" in str(summary(result).caption)  # pyright: ignore[reportAttributeAccessIssue]


def test_texts_of_an_exported_folder_are_not_kept(neox_run: runs.Run, tmp_path: Path) -> None:
    export(ExportSettings(workspace=tmp_path, runs=("flow",), out=tmp_path / "exported"))
    with pytest.raises(RunError, match=r"--keep for .* / expected: a run"):
        generate(settings(tmp_path, target=str(tmp_path / "exported"), keep=True))


def test_a_draft_never_changes_the_text(run: runs.Run, teacher: Teacher, tmp_path: Path) -> None:
    out = io.StringIO()
    result = generate(settings(tmp_path, draft="flow", max_new_tokens=24), out)
    assert result["equals_teacher"]
    assert result["skip_draft"]["equals_teacher"]
    assert result["text"] == result["teacher_alone"]["text"]
    assert out.getvalue() == PROMPT + result["text"] + "\n"
    assert 0 <= result["accepted_tokens"] <= result["proposed_tokens"]
    assert result["accepted_tokens"] + result["teacher_calls"] == result["new_tokens"]
    assert result["speed_up"] > 0
    assert "the same text" in str(summary(result))


def test_a_perfect_draft_is_accepted_whole(neox_teacher: Teacher, tokenizer: Any) -> None:
    model = load_teacher(neox_teacher)
    draft = without_layers(model, neox_teacher, [])
    model.generation_config.assistant_confidence_threshold = (
        draft.generation_config.assistant_confidence_threshold
    ) = 0
    speculation = speculate(model, draft, tokenizer, PROMPT, 24)
    alone = continue_prompt(model, tokenizer, PROMPT, 24)
    assert speculation.continuation.tokens == alone.tokens
    assert speculation.accepted == speculation.proposed > 0
    assert speculation.summary(alone).acceptance_rate == 1
    assert speculation.teacher_calls < len(alone.tokens)


@torch.inference_mode()
def test_a_skipping_draft_is_the_teacher_without_those_layers(teacher: Teacher) -> None:
    model = load_teacher(teacher)
    ids = torch.arange(1, 12)[None]
    draft = without_layers(model, teacher, [(1, 3)])
    assert draft.config.num_hidden_layers == 2
    kept = getattr(model.base_model, teacher.family.model_layers)
    del kept[1:3]
    for index, layer in enumerate(kept):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    torch.testing.assert_close(draft(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "flow", "prompt": None}, SettingsError, "without a prompt"),
        ({"target": "flow", "prompt": ""}, SettingsError, "without a prompt"),
        ({}, SettingsError, "without a model"),
        ({"target": "flow", "draft": "flow"}, SettingsError, "both a model and --draft"),
        ({"draft": "flow", "temperature": 1.0}, SettingsError, "--draft with --temperature"),
        ({"draft": "flow", "repetition_penalty": 2.0}, SettingsError, "--draft with --repetition-penalty"),
        ({"draft": "flow", "compare": True}, SettingsError, "--draft with --compare"),
        ({"draft": "flow", "keep": True}, SettingsError, "--draft with --keep"),
        ({"target": "nothing"}, RunError, "no run nothing"),
        ({"target": "no/thing"}, RunError, "a finished run"),
        ({"target": "empty"}, RunError, "expected: a finished run"),
        ({"target": "flow", "max_new_tokens": 1000}, SettingsError, "at most 128 together"),
        ({"target": "plain", "k": 2}, RunError, "only they have steps"),
        ({"draft": "plain"}, RunError, "expected: a run"),
        ({"target": "foreign", "compare": True}, RunError, "names its teacher"),
    ],
)
def test_writing_that_makes_no_sense_is_refused(neox_run, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("plain", "foreign"):
        if name in options.values():
            export(ExportSettings(workspace=tmp_path, runs=("flow",), form="plain", out=tmp_path / name))
    (tmp_path / "foreign" / "lftpipe.json").unlink(missing_ok=True)
    with pytest.raises(kind, match=message):
        generate(settings(tmp_path, **options))


def test_an_end_of_text_ends_the_text_and_counts(
    neox_run: runs.Run, neox_teacher: Teacher, tokenizer: Any
) -> None:
    student = build_student(neox_teacher, [neox_run])
    with torch.no_grad():
        student.lm_head.weight[0] = 0
        student.lm_head.weight[1:] = -student.base_model(
            torch.ones(1, 1, dtype=torch.long)
        ).last_hidden_state[0]
    continuation = continue_prompt(student, tokenizer, PROMPT, 12)
    assert continuation.tokens[-1] == 0
    assert len(continuation.tokens) <= 12
    assert "<|endoftext|>" not in continuation.text


def test_the_command_streams_or_prints_one_object(neox_run: runs.Run, tmp_path: Path) -> None:
    common = ["generate", "flow", "--workspace", str(tmp_path), "--prompt", PROMPT, "--max-new-tokens", "5"]
    streamed = CliRunner().invoke(app, common)
    assert streamed.exit_code == 0
    assert streamed.stdout.startswith(PROMPT)
    assert "tokens/s" in streamed.stdout.splitlines()[-1]
    as_json = CliRunner().invoke(app, [*common, "--json", "--k", "1"])
    assert json.loads(as_json.stdout)["k"] == 1
    refused = CliRunner().invoke(app, [*common, "--k", "0"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == "error: given: --k 0 / expected: at least 1 / do: raise --k\n"
