import json
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest

import lftpipe
from lftpipe.base.errors import RunError
from lftpipe.cli import app as cli
from lftpipe.config.settings import TrainSettings
from lftpipe.results.outcomes import Outcome


@pytest.fixture
def run(capsys):
    """Type a command; its exit status, stdout and stderr."""

    def type_(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.app(list(arguments), prog_name="lftpipe")
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return type_


@pytest.fixture
def stage(monkeypatch):
    """Put a function in the place of `lftpipe train`'s."""

    def install(function, summary=lambda result: f"made {result['run']}") -> None:
        fake = SimpleNamespace(train=function, summary=summary)
        monkeypatch.setitem(sys.modules, "lftpipe.commands.train", fake)

    return install


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ, timeout=120
    )


HEAVY = ["torch", "transformers", "zarr", "datasets", "scipy", "matplotlib", "ot", "pyarrow"]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["extract", "--nonsense"]])
def test_help_and_usage_errors_load_nothing_heavy(arguments):
    code = f"""
import sys
from lftpipe.cli.app import main
try:
    main()
finally:
    print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = python(code, *arguments)
    assert done.returncode == (2 if "--nonsense" in arguments else 0), done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert "--workspace" in out
    assert "--json" in out
    assert "--debug" in out


def test_the_help_lists_what_one_always_needs_first_and_experts_options_last(run):
    out = run("train", "--help")[1]
    titles = re.findall(r"╭─ ([^─]+) ─", out)
    assert titles[0] == "Options"
    assert titles[-2:] == ["For experts", "Every command"]
    first, rest = out.split("╰", 1)
    assert "--block" in first
    assert "--run" in first
    assert "--clip" not in first
    assert "--clip" in rest


def test_every_option_has_a_help_and_shows_its_default():
    # In a process of its own: pydantic finds no docstrings in modules that jaxtyping's hook has rewritten.
    code = """
from lftpipe.results.outcomes import Outcome
from lftpipe.cli import app as cli
for name in cli.COMMANDS:
    for parameter in cli.command_of(name).params:
        print(name, *parameter.opts, "help:", parameter.help)
"""
    lines = python(code).stdout.splitlines()
    assert "evaluate --k help: Numbers of steps at inference. (default: 1,2,3,8)" in lines
    assert (
        "train --joint help: Train the flow layers of several blocks as one student, in one run: "
        in "\n".join(lines)
    )
    assert [line for line in lines if line.endswith(("help: None", "help: ")) or "help: (" in line] == []


def test_the_list_of_commands_needs_no_settings():
    done = python(
        "import sys, lftpipe.cli.app; lftpipe.cli.app.app(['--help'], standalone_mode=False);"
        "print('loaded:', [name for name in ('pydantic', 'lftpipe.config.settings') if name in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert all(name in done.stdout for name in cli.COMMANDS)


CONTRACT = {
    "extract": "--model --corpus --layers --context --tokens --validation-tokens --store --attention "
    "--no-attention --dtype --compute-dtype --batch-tokens --device --threads --dry-run --resume "
    "--no-resume --revision --force --seed --trust-remote-code",
    "recouple": "--tokens --batches --metric --layers --seed --out",
    "train": "--block --objective --walk-steps --solver --tokens --batch-tokens --learning-rate --seed --run "
    "--resume --from-cache --from-teacher --device",
    "evaluate": "--k --skips --out",
}


@pytest.mark.parametrize("command", CONTRACT)
def test_the_contracts_options_are_there(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    words = set(run(command, "--help")[1].replace(",", " ").replace("/", " ").split())
    assert set(CONTRACT[command].split()) - words == set()


def test_the_version(run):
    assert run("--version") == (0, lftpipe.__version__ + "\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["train", "--objective", "magic"],
        ["train", "--tokens", "many"],
        ["extract", "--dtype", "float64"],
        ["verify", "a", "b"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Error" in err


@pytest.mark.parametrize("command", ["verify", "info", "generate", "export", "evaluate", "heal", "push"])
def test_what_stands_behind_a_command_is_its_subject(run, monkeypatch, command):
    seen = []
    fake = SimpleNamespace(
        **{command: lambda settings: seen.append(settings) or {}}, summary=lambda result: ""
    )
    monkeypatch.setitem(sys.modules, f"lftpipe.commands.{command}", fake)
    assert run(command, "here")[0] == 0
    subject = seen[0].runs if command in ("export", "evaluate") else (seen[0].target,)
    assert [str(each) for each in subject] == ["here"]


def test_a_run_may_be_named_several_times(run, stage):
    seen = []
    stage(lambda settings: seen.append(settings) or {"run": "x"})
    run("train", "--block", "1:2", "--block", "3:4", "--run", "a", "--run", "b")
    assert (seen[0].block, seen[0].run) == ("1:2,3:4", "a,b")


def test_options_become_settings(run, stage, tmp_path):
    seen = []
    stage(lambda settings: seen.append(settings) or {"run": "x"})
    (tmp_path / "r.toml").write_text("[train]\nseed = 5\nclip = 2.0\n")
    arguments = ["--block", "1:3", "--from-teacher", "--seed", "0", "--recipe", str(tmp_path / "r.toml")]
    assert run("train", *arguments)[0] == 0
    assert seen[0] == TrainSettings(block="1:3", from_teacher=True, seed=0, clip=2.0)
    assert run("train", "--from-cache")[0] == 0
    assert seen[1] == TrainSettings()


def test_json_is_exactly_one_object_and_the_summary_is_for_people(run, stage):
    made = make_dataclass(
        "Made", [("run", str), ("loss", float)], bases=(Outcome,), frozen=True, kw_only=True
    )
    stage(lambda settings: made(run="data/[x]/a", loss=0.5))
    status, out, err = run("train", "--json")
    assert (status, json.loads(out), err) == (0, {"run": "data/[x]/a", "loss": 0.5}, "")
    assert out.count("\n") == 1
    assert run("train") == (0, "made data/[x]/a\n", "")  # brackets are no markup


def test_a_result_that_failed_exits_with_1(run, stage):
    stage(lambda settings: {"run": "x", "failed": True})
    assert run("train")[:2] == (1, "made x\n")


def failing(error: BaseException):
    def stage(settings):
        raise error

    return stage


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunError("a\nb", "c", "d"), "error: given: a b / expected: c / do: d"),
        (
            OSError(28, "No space left on device", "/x"),
            r"error: given: No space left on device at /x / expected: ",
        ),
        (OSError(13, "Permission denied", "/x"), "error: given: Permission denied at /x / expected: "),
        (
            ZeroDivisionError("division by zero"),
            "error: given: ZeroDivisionError: division by zero / expected: ",
        ),
    ],
)
def test_an_error_is_one_line_with_the_cure_and_debug_shows_where(run, stage, error, line):
    stage(failing(error))
    for json_option in ([], ["--json"]):
        status, out, err = run("train", *json_option)
        assert (status, out) == (1, "")
        assert err.startswith(line)
        assert " / do: " in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
    with pytest.raises(type(error)) as raised:
        cli.app(["train", "--debug"], prog_name="lftpipe")
    assert raised.value is error


def test_debug_prints_the_traceback():
    code = """
import sys, types
from lftpipe.base.errors import StoreError
def train(settings):
    raise StoreError("no store", "one", "make it")
sys.modules["lftpipe.commands.train"] = types.SimpleNamespace(train=train)
from lftpipe.cli.app import main
main()
"""
    done = python(code, "train", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lftpipe.base.errors.StoreError")
    done = python(code, "train")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: given: no store / expected: one / do: make it\n"


def test_an_interrupt_is_no_traceback(run, stage):
    stage(failing(KeyboardInterrupt()))
    status, out, err = run("train")
    assert (status, out) == (130, "")
    assert "--resume goes on" in err
    assert err.count("\n") == 1


def test_an_interrupted_sweep_needs_no_resume(run, monkeypatch):
    fake = SimpleNamespace(sweep=failing(KeyboardInterrupt()))
    monkeypatch.setitem(sys.modules, "lftpipe.commands.sweep", fake)
    status, out, err = run("sweep")
    assert (status, out) == (130, "")
    assert "do: run the same command again" in err
    assert "--resume" not in err


def test_a_recipe_with_an_unknown_key_is_refused_before_the_stage_runs(run, stage, tmp_path):
    stage(failing(AssertionError("the stage ran")))
    (tmp_path / "r.toml").write_text("[train]\nlearning_rat = 1\n")
    status, out, err = run("train", "--recipe", str(tmp_path / "r.toml"))
    assert (status, out) == (1, "")
    assert "'learning_rat' in [train]" in err


def test_a_list_of_numbers_is_a_list_of_numbers(run):
    status, _, err = run("evaluate", "--k", "1,two")
    assert status == 1
    assert err.startswith("error: given: --k 1,two / expected: numbers with commas between, as in 1,2,3")
    status, _, err = run("evaluate", "--adaptive", "0.1,much")
    assert (status, err.split(" / ")[1]) == (1, "expected: numbers with commas between, as in 0.02,0.05")
    status, _, err = run("evaluate", "--adaptive", "0.1,-2")
    assert (status, err) == (
        1,
        "error: given: --adaptive -2.0 / expected: at least 0 / do: raise --adaptive\n",
    )
