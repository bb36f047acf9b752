"""Exported folders: exact, complete, refused where they could only be approximate, and never half there."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_weights
from report_data import results
from tiny_students import export_settings as settings
from tiny_students import save_run, tokens
from typer.testing import CliRunner

from lftpipe import runs
from lftpipe.base.errors import RunError, TeacherError
from lftpipe.cli.app import app
from lftpipe.commands.export import export, summary
from lftpipe.results.scores import Score
from lftpipe.student.assemble import build_student, load_model
from lftpipe.student.plain import unroll
from lftpipe.teacher.source import Teacher, load_tokenizer, open_teacher

#: Largest difference of logits in float32 that counts as the same function.
EXACT = 1e-4


@pytest.fixture
def neox_run(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    return save_run(tmp_path / "neox" / "runs" / "flow", neox_teacher, (1, 3), solver="euler")


@pytest.fixture
def llama_teacher(teachers: dict[str, Path]) -> Teacher:
    return open_teacher(str(teachers["llama"]), Path("unused"))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@torch.inference_mode()
def test_plain_neox_is_exact(neox_run: runs.Run, neox_teacher: Teacher, tmp_path: Path, k: int) -> None:
    result = export(settings(neox_run, tmp_path, form="plain", k=k))
    plain, student = load_model(tmp_path / "out"), build_student(neox_teacher, [neox_run], steps=k)
    assert (plain.config.model_type, plain.config.num_hidden_layers) == ("gpt_neox", 1 + k + 1)
    ids = tokens(32, sequences=3)
    difference = (plain(ids).logits - student(ids).logits).abs().max().item()
    assert difference < EXACT
    assert result["max_logit_difference"] < EXACT
    assert result["layers"] == 2 + k


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("neox-tied", {}),
        ("neox-sequential", {}),
        ("llama", {}),
        ("llama-untied", {}),
        ("neox", {"kind": "layer"}),
        ("llama", {"kind": "layer"}),
        ("neox", {"shift": False}),
        ("neox", {"step": True}),
    ],
)
@torch.inference_mode()
def test_one_euler_step_is_exact_for_every_family(
    teachers: dict[str, Path], tmp_path: Path, name: str, part: dict[str, Any]
) -> None:
    teacher = open_teacher(str(teachers[name]), tmp_path)
    run = save_run(tmp_path / "run", teacher, (1, 3), solver="euler", walk_steps=1, part=part)
    export(settings(run, tmp_path, form="plain"))
    plain, student = load_model(tmp_path / "out"), build_student(teacher, [run])
    ids = tokens(32, sequences=2)
    assert plain.config.model_type == teacher.config.model_type
    assert (plain(ids).logits - student(ids).logits).abs().max() < EXACT


@torch.inference_mode()
def test_several_blocks_unroll_together(neox_teacher: Teacher, neox_run: runs.Run, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", neox_teacher, (3, 4), solver="euler")
    names = (str(other.path), str(neox_run.path))
    export(settings(neox_run, tmp_path, form="plain", k=2, runs=names))
    plain, student = load_model(tmp_path / "out"), build_student(neox_teacher, [neox_run, other], steps=2)
    assert plain.config.num_hidden_layers == 5
    assert (plain(tokens(9)).logits - student(tokens(9)).logits).abs().max() < EXACT


def test_an_unrolled_student_shares_nothing_that_is_trained(
    neox_teacher: Teacher, neox_run: runs.Run
) -> None:
    student = build_student(neox_teacher, [neox_run])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    unroll(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("name", "run_settings", "options", "message"),
    [
        ("neox", {}, {"solver": "midpoint"}, "midpoint connects two evaluations"),
        ("llama", {}, {"k": 2}, "in 2 steps of sequential-residual layers"),
        ("neox-sequential", {}, {"k": 3}, "in 3 steps of sequential-residual layers"),
        ("llama", {"part": {"shift": True}}, {"k": 1}, "no bias to fold one into"),
        ("neox", {"part": {"source": True}}, {}, "whose velocity sees x_0"),
        ("neox", {"part": {"kind": "linear"}}, {}, "a linear map"),
    ],
)
def test_what_is_not_exact_is_refused(
    teachers: dict[str, Path],
    tmp_path: Path,
    name: str,
    run_settings: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    run = save_run(
        tmp_path / "run", open_teacher(str(teachers[name]), tmp_path), (1, 3), solver="euler", **run_settings
    )
    with pytest.raises(RunError, match=message):
        export(settings(run, tmp_path, form="plain", **options))
    assert not (tmp_path / "out").exists()
    export(settings(run, tmp_path, form="latent-flow", **options))
    assert load_model(tmp_path / "out").config.teacher_layers == 4


def test_everything_goes_along(neox_run: runs.Run, neox_teacher: Teacher, tmp_path: Path) -> None:
    result = export(settings(neox_run, tmp_path, form="plain", k=3))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "lftpipe.json",
    }
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    from transformers import AutoTokenizer

    text = "the state of a layer"
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(neox_teacher)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    source = json.loads((tmp_path / "out" / "lftpipe.json").read_text())
    digest = {"tokenizer_digest": neox_teacher.tokenizer_digest}
    assert source["teacher"] == neox_teacher.identity() | digest
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert "logits differ" in summary(result)


@pytest.mark.parametrize(
    ("name", "changes", "written"),
    [
        ("neox", {"partial_rotary_factor": 0.5, "rope_theta": 20_000.0}, ("rotary_pct", "rotary_emb_base")),
        ("llama", {"rope_theta": 100_000.0}, ("rope_theta",)),
    ],
)
@torch.inference_mode()
def test_older_readers_find_the_rotary_embedding_too(
    teachers: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, float], written: tuple[str, ...]
) -> None:
    folder = shutil.copytree(teachers[name], tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    teacher = open_teacher(str(folder), tmp_path)
    run = save_run(tmp_path / "run", teacher, (1, 3), solver="euler", walk_steps=1)
    export(settings(run, tmp_path, form="plain"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in written] == list(changes.values())
    plain, student = load_model(tmp_path / "out"), build_student(teacher, [run])
    assert plain.config.rope_parameters == student.config.rope_parameters
    assert (plain(tokens(32)).logits - student(tokens(32)).logits).abs().max() < EXACT


def test_the_card_says_what_it_is(neox_run: runs.Run, tmp_path: Path) -> None:
    export(settings(neox_run, tmp_path, form="plain", k=3))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "layers 1 to 2 replaced by one flow layer, run in 3 euler steps" in card
    assert "a gpt_neox checkpoint of 5 layers" in card
    assert "| flow | 1:3 | fw | 0 | 1,000 |" in card
    assert "Not measured yet: `lftpipe evaluate flow --k 3` does." in card
    assert "import lftpipe" not in card


def test_the_card_takes_its_rows_from_the_table(neox_run: runs.Run, tmp_path: Path) -> None:
    teacher = Score(method="teacher", ppl=9.02, parameters=100)
    ours = Score(
        **{"method": "fw", "run": "flow", "block": "1:3", "k": 3, "solver": "euler", "ppl": 11.86},
        **{"parameters": 90, "weights_digest": neox_run.weights_digest},
    )
    other = replace(ours, k=1, ppl=12.42)
    older = replace(ours, weights_digest="of the run before it was trained again", ppl=15.11)
    results(rows=[teacher, older, ours, other]).write(tmp_path / "neox" / "results.json")
    export(settings(neox_run, tmp_path, k=3))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "9.02" in card
    assert "11.86" in card
    assert "12.42" not in card
    assert "15.11" not in card
    assert "trust_remote_code=True" in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_written(neox_run: runs.Run, tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open

    export(settings(neox_run, tmp_path, form="plain", k=1, dtype=dtype))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118


def test_a_name_breaks_neither_the_card_nor_its_table(neox_run: runs.Run, tmp_path: Path) -> None:
    evil = neox_run.path.with_name("a|b<img src=x>")
    neox_run.path.rename(evil)
    export(settings(neox_run, tmp_path, runs=(str(evil),)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a&#124;b&lt;img src=x&gt; | 1:3 |" in card


def test_the_default_place_is_in_the_run(neox_run: runs.Run, tmp_path: Path) -> None:
    result = export(settings(neox_run, tmp_path, out=None, k=2, form="plain"))
    assert Path(result["out"]) == neox_run.path / "export-plain-k2"


BARE = """
import sys
sys.modules["lftpipe"] = None  # importing it from now on is an error
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenizer("the state of a layer", return_tensors="pt")
written = model.generate(**tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
print(type(model).__name__, *written[0].tolist())
"""


@pytest.mark.slow
@torch.inference_mode()
def test_plain_exports_need_no_lftpipe(neox_run: runs.Run, neox_teacher: Teacher, tmp_path: Path) -> None:
    export(settings(neox_run, tmp_path, form="plain", k=3))
    command = [sys.executable, "-I", "-c", BARE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    kind, *written = done.stdout.split()
    assert kind == "GPTNeoXForCausalLM"
    student = build_student(neox_teacher, [neox_run], steps=3)
    inputs = load_tokenizer(neox_teacher)("the state of a layer", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert [int(token) for token in written] == student.generate(inputs["input_ids"], **options)[0].tolist()


def test_runs_are_found_by_name(neox_run: runs.Run, neox_teacher: Teacher, tmp_path: Path) -> None:
    assert export(settings(neox_run, tmp_path, runs=("flow",)))["runs"] == [str(neox_run.path)]
    save_run(tmp_path / "other" / "runs" / "flow", neox_teacher, (1, 3))
    with pytest.raises(RunError, match="2 runs named flow"):
        export(settings(neox_run, tmp_path, runs=("flow",)))


def test_runs_of_a_changed_teacher_or_with_changed_weights_are_refused(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(teachers["neox"], tmp_path / "teacher")
    run = save_run(tmp_path / "run", open_teacher(str(folder), tmp_path), (1, 3))
    good = (run.path / "flow.safetensors").read_bytes()
    (run.path / "flow.safetensors").write_bytes(good[:-1] + b"\x00")
    with pytest.raises(RunError, match="weights that the manifest was written for"):
        export(settings(run, tmp_path))
    (run.path / "flow.safetensors").write_bytes(good)
    change_weights(folder)
    with pytest.raises(TeacherError, match="weights changed since"):
        export(settings(run, tmp_path))


def test_the_command_prints_one_object_or_one_error_line(neox_run: runs.Run, tmp_path: Path) -> None:
    common = ["export", str(neox_run.path), "--workspace", str(tmp_path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*common, "--k", "2", "--form", "plain", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["layers"] == 4
    refused = CliRunner().invoke(app, [*common, "--k", "0"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: given: --k 0 / expected: at least 1 / do: ")
