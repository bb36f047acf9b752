"""The library: what `import lftpipe` loads, what it offers, and that each stage is a function."""

import doctest
import inspect
import os
import subprocess
import sys

import pytest

import lftpipe
from lftpipe import api
from lftpipe.api import Result
from lftpipe.base.errors import LftpipeError
from lftpipe.cli.app import COMMANDS
from lftpipe.student import assemble

#: Commands whose function has another name, since a module or a verb has theirs.
NAMES = {"runs": "list_runs", "compare": "compare_runs"}


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_library_loads_no_other():
    """Neither does asking what is in it."""
    heavy = ("torch", "numpy", "transformers", "zarr", "pydantic", "typer", "rich", "matplotlib")
    code = f"import sys, lftpipe; dir(lftpipe); print([name for name in {heavy} if name in sys.modules])"
    assert python(code) == "[]"


def test_importing_the_library_takes_less_than_a_tenth_of_a_second():
    """Of the processor, at the best of three."""
    code = "import time; start = time.process_time(); import lftpipe; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_the_stages_need_no_torch_until_they_run():
    assert python(
        "import sys, lftpipe; lftpipe.train, lftpipe.open_store; print('torch' in sys.modules)"
    ) == ("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function(command):
    function = getattr(lftpipe, NAMES.get(command, command))
    assert f"lftpipe {command}" in (inspect.getdoc(function) or "")
    assert NAMES.get(command, command) in lftpipe.__all__


def test_all_that_is_public_is_there_and_nothing_else():
    assert lftpipe.__all__ == sorted(set(lftpipe.__all__))
    assert all(getattr(lftpipe, name) is not None for name in lftpipe.__all__)
    assert set(lftpipe.__all__) <= set(dir(lftpipe))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = lftpipe.magic


def test_an_error_of_a_stage_is_raised(tmp_path):
    with pytest.raises(LftpipeError, match="without a store"):
        lftpipe.recouple(workspace=tmp_path)


def test_a_result_shows_itself_as_a_table_without_markup_from_outside():
    rows = [{"method": "<b>teacher</b>", "kl": None, "parameters": 1000}, {"method": "fw", "kl": 0.25}]
    result = Result("evaluate", {"rows": rows}, lambda values: f"{len(values['rows'])} rows")
    assert (len(result), list(result), repr(result)) == (1, ["rows"], "2 rows")
    html = result._repr_html_()
    assert "<th>KL</th>" in html
    assert "<td>0.25</td>" in html
    assert "<td>1,000</td>" in html
    assert "&lt;b&gt;teacher" in html
    assert "<b>" not in html


def test_a_table_that_is_not_table_1_shows_all_of_its_columns():
    rows = [{"teacher": "tiny", "run": "a", "train_tokens": 64, "state": "finished"}]
    html = Result("runs", {"rows": rows}, lambda values: "")._repr_html_()
    for name in ("teacher", "run", "train tokens", "state"):
        assert f"<th>{name}</th>" in html


def test_a_result_without_rows_shows_its_summary():
    result = Result("train", {"run": "a<b"}, lambda values: f"made {values['run']}")
    assert result._repr_html_() == "<pre>made a&lt;b</pre>"


@pytest.mark.slow
def test_the_examples_in_the_documentation_of_the_library_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LFTPIPE_WORKSPACE", raising=False)
    found = doctest.testmod(api)
    assert found.attempted > 5
    assert found.failed == 0


def test_a_student_s_teacher_is_looked_for_in_its_own_workspace(tmp_path, stores, monkeypatch):
    run = tmp_path / "own/neox/runs/run"
    lftpipe.train(store=stores["neox"], block="1:3", objective="skip", run=str(run))

    def teacher_of_run(run, workspace):
        raise KeyboardInterrupt(workspace)

    monkeypatch.setattr(assemble, "teacher_of_run", teacher_of_run)
    with pytest.raises(KeyboardInterrupt) as raised:
        lftpipe.load_student(run)
    assert raised.value.args == (tmp_path / "own",)
