"""A student's classes as one file: transformers runs it where lftpipe cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_students import save_run, tokens

from lftpipe.commands.export import export
from lftpipe.config.settings import ExportSettings
from lftpipe.student.assemble import load_model
from lftpipe.student.standalone_modeling import MODULE, bundle
from lftpipe.teacher.source import load_tokenizer, open_teacher

WITHOUT_LFTPIPE = """
import sys
sys.modules["lftpipe"] = None  # importing it from now on is an error
sys.modules["jaxtyping"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
given = torch.load(sys.argv[2])
with torch.inference_mode():
    text = model.generate(given[:1], max_new_tokens=6, do_sample=False)
    torch.save((model(given).logits, text), sys.argv[3])
"""


def exported(teacher, folder, **options):
    run = save_run(folder / "run", teacher, (1, 3), solver=options.get("solver", "midpoint"))
    export(ExportSettings(workspace=folder, runs=(str(run.path),), **options))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["neox", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_export_runs_without_lftpipe(family, teachers, tmp_path, monkeypatch):
    out = tmp_path / "student"
    exported(open_teacher(str(teachers[family]), Path("unused")), tmp_path, k=2, out=out)
    student = load_model(out)
    given = tokens(12, sequences=2)
    torch.save(given, tmp_path / "given.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [
        sys.executable,
        "-c",
        WITHOUT_LFTPIPE,
        *map(str, (out, tmp_path / "given.pt", tmp_path / "made.pt")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, text = torch.load(tmp_path / "made.pt")
    with torch.inference_mode():
        torch.testing.assert_close(logits, student(given).logits, rtol=0, atol=0)
        expected = student.generate(given[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(text, expected)


def test_the_file_is_named_in_the_config_and_among_the_files_of_the_export(neox_teacher, tmp_path):
    for form in ("latent-flow", "plain"):
        out = tmp_path / form
        exported(neox_teacher, tmp_path / f"of {form}", form=form, out=out, solver="euler", k=1)
        config = json.loads((out / "config.json").read_text())
        assert ("auto_map" in config) == (form == "latent-flow") == (out / f"{MODULE}.py").is_file()
    assert f"{MODULE}.py" in json.loads((tmp_path / "latent-flow/lftpipe.json").read_text())["files"]


@pytest.mark.parametrize("root", ["lftpipe.student.derived"])
def test_the_file_is_made_of_the_modules_that_run_here(root):
    source = "\n\n".join(bundle(root))
    compile(source, MODULE, "exec")
    assert "import lftpipe" not in source
    assert "from lftpipe" not in source
    assert f"# --- {root}" in source


TOKENIZER = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(*tokenizer("the state of a layer")["input_ids"])
"""


@pytest.mark.slow
def test_the_tokenizer_of_an_export_needs_no_code_and_asks_for_none(neox_teacher, tmp_path):
    out = tmp_path / "student"
    exported(neox_teacher, tmp_path, out=out)
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)' in (
        out / "README.md"
    ).read_text("utf-8")
    (out / f"{MODULE}.py").write_text("raise SystemExit('code was run')")
    command = [sys.executable, "-c", TOKENIZER, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert done.returncode == 0, done.stderr
    ours = load_tokenizer(neox_teacher)("the state of a layer")["input_ids"]
    assert [int(token) for token in done.stdout.split()] == ours
