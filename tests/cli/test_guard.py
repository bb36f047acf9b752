"""The command as a process: interrupts at any moment, several ranks, terminals of ASCII, no memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lftpipe.cli.guard import line_of

#: A stage that takes the place of `lftpipe train`'s, in the process that is started.
PROGRAM = """
import sys, types
{before}
def train(settings):
    {body}
sys.modules["lftpipe.commands.train"] = types.SimpleNamespace(train=train, summary=str)
from lftpipe.__main__ import main
main()
"""


def start(body: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    code = PROGRAM.format(body=body, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code, "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


#: An import that says that it began, and lasts.
SLOW = """
import importlib.abc
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{name}":
            import time
            print("begun", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize(
    "name", ["typer", "lftpipe.cli.app", "lftpipe.config.settings", "pydantic", "rich.console"]
)
def test_an_interrupt_while_python_imports_is_one_line(name):
    process = start("pass", SLOW.replace("{name}", name))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("error: given: an interrupt / expected: ")
    assert err.count("\n") == 1


def test_an_interrupt_while_a_stage_is_imported_is_one_line(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "lftpipe", "verify", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": ""},
    )
    time.sleep(0.4)  # somewhere in its imports, or in Python's own start
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 130:
        assert err.count("\n") == 1
        assert "Traceback" not in err
    else:  # Python itself had not begun, or all was over
        assert process.returncode in (1, -signal.SIGINT)


def test_an_interrupt_in_a_stage_is_raised_there():
    body = """
    try:
        print("begun", flush=True)
        import time; time.sleep(30)
    finally:
        print("cleaned up", flush=True)"""
    process = start(body)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "cleaned up\n")
    assert "do: the same command with --resume goes on" in err
    assert err.count("\n") == 1


#: What a launcher sets in the environment of one of two processes.
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

REFUSAL = 'from lftpipe.base.errors import RunError; raise RunError("a", "b", "c")'


def test_of_several_ranks_that_refuse_the_first_says_why():
    first, other = start(REFUSAL, RANK="0", **TWO), start(REFUSAL, RANK="1", **TWO)
    assert first.communicate(timeout=30)[1] == "error: given: a / expected: b / do: c\n"
    other.terminate()  # as torchrun does once a process has failed
    assert other.communicate(timeout=30)[1] == ""


def test_a_rank_that_fails_alone_says_so_in_the_end():
    other = start(REFUSAL, "from lftpipe.cli import guard; guard.GRACE = 0.1", RANK="1", **TWO)
    assert other.communicate(timeout=30)[1] == "process 1: error: given: a / expected: b / do: c\n"
    assert other.returncode == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_whose_partner_is_gone_leaves_the_word_to_it(rank):
    gone = 'print("gone", flush=True); raise RuntimeError("gloo: Connection closed by peer")'
    patient = start(gone, "from lftpipe.cli import guard; guard.GRACE = 0.1", RANK=rank, **TWO)
    assert patient.stdout is not None
    assert patient.stdout.readline() == "gone\n"
    with pytest.raises(subprocess.TimeoutExpired):
        patient.communicate(timeout=1)  # ten times as long as a refusal of its own would take
    patient.terminate()  # as torchrun does once a process has failed
    assert patient.communicate(timeout=30)[1] == ""
    hasty = "from lftpipe.cli import guard; guard.GRACE = guard.GRACE_OF_THE_LEFT = 0.1"
    _, err = start(gone, hasty, RANK=rank, **TWO).communicate(timeout=30)
    assert "expected: all processes to go on to the end" in err
    assert err.count("\n") == 1


def test_a_terminal_of_ascii_shows_what_it_can():
    process = start(r'return {"run": "gr\xf6\xdfe\u20131"}', PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert r"gr\xf6\xdfe\u20131" in out
    failing = start(
        'from lftpipe.base.errors import RunError; raise RunError("ö", "b", "c")', PYTHONIOENCODING="ascii"
    )
    assert failing.communicate(timeout=30)[1] == "error: given: \\xf6 / expected: b / do: c\n"


class OutOfMemoryError(RuntimeError):
    """By the name of torch's."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB for an array"),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
)
def test_too_little_memory_is_no_defect(error):
    assert "expected: enough memory / do: lower --batch-tokens" in line_of(error)
    assert "defect" not in line_of(error)


def test_what_nobody_foresaw_is_a_defect_and_a_full_disk_is_none():
    assert "expected: no such thing, a defect of lftpipe" in line_of(ZeroDivisionError("x"))
    assert "No space left on device at /x" in line_of(OSError(28, "No space left on device", "/x"))

    class SafetensorError(Exception):
        """As Rust's library has it: no OSError, no number."""

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "(os error 28) / expected: to read and write there / do: free space on that" in line_of(full)
    assert "do: choose a shorter name" in line_of(OSError(36, "File name too long", "/x"))


def test_too_few_open_files_name_the_limit():
    assert "do: let a process open more files, `ulimit -n 4096`" in line_of(
        OSError(24, "Too many open files")
    )
    assert "`ulimit -n 4096`" in line_of(RuntimeError("unable to open file </x>: Too many open files (24)"))


def test_a_command_may_open_as_many_files_as_its_user():
    shown = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE)); return 'done'"
    lowered = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))"
    out, err = start(shown, lowered).communicate(timeout=60)
    assert out.splitlines()[0] == "1000 1000", err
