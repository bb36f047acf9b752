"""Two processes under a real `torchrun`: when one refuses or dies, one says why, and training goes on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from training_runs import log_of

from lftpipe import runs
from lftpipe.cli.guard import line_of

#: lftpipe, in which the process of a rank is killed as it is about to do a step.
DYING = """
import os, signal, sys
import torch
from lftpipe.training import step
rank, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
real = step.loss_of
def loss_of(run, batch):
    if run.step == number and os.environ["RANK"] == str(rank) and torch.is_grad_enabled():
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, batch)
step.loss_of = loss_of
from lftpipe.cli.app import main
main()
"""


@pytest.fixture
def arguments(stores, tmp_path) -> list[str]:
    tokens, batch = str(12 * 4 * CONTEXT), str(4 * CONTEXT)
    return [
        *("train", "--store", str(stores["neox"]), "--block", "1:3", "--tokens", tokens, "--threads", "1"),
        *("--batch-tokens", batch, "--compute-dtype", "float32", "--checkpoint-every", "4"),
        *("--log-every", "1", "--run", str(tmp_path / "run")),
    ]


def torchrun(*command: str) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and what lftpipe's processes said on standard error."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    lines = [line for line in done.stderr.splitlines() if "given:" in line or "lftpipe/" in line]
    return done.returncode, done.stdout, lines


@pytest.mark.slow
def test_what_both_refuse_is_said_once(arguments):
    status, out, lines = torchrun("-m", "--", "lftpipe", *arguments, "--walk-steps", "0")
    assert (status, out) == (1, "")
    assert len(lines) == 1
    assert lines[0].startswith("error: given: --walk-steps 0")


@pytest.mark.slow
def test_what_the_first_refuses_is_said_once_and_the_other_ends(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("not a run")
    status, out, lines = torchrun("-m", "--", "lftpipe", *arguments)
    assert (status, out) == (1, "")
    assert len(lines) == 1
    assert "which holds notes and no run" in lines[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_when_a_process_dies_the_other_ends_and_the_same_command_goes_on(arguments, tmp_path, rank):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    status, out, lines = torchrun("--", str(script), rank, "7", *arguments)
    assert status != 0
    assert out == ""
    assert len(lines) <= 1
    assert not any("defect" in line or "Traceback" in line for line in lines)
    run = tmp_path / "run"
    assert (run / runs.CHECKPOINT).exists()
    assert not (run / runs.MANIFEST).exists()
    status, out, lines = torchrun("-m", "--", "lftpipe", *arguments, "--resume")
    assert (status, lines) == (0, [])
    assert out.count("next: lftpipe evaluate") == 1
    assert [row["step"] for row in log_of(run)] == list(range(1, 13))
    assert runs.open_run(Path(run)).train_tokens == 12 * 4 * CONTEXT


@pytest.mark.slow
def test_a_student_is_healed_by_two_processes_as_by_one(arguments, tmp_path):
    train, heal = arguments, ["heal", str(tmp_path / "run"), *arguments[1:3], *arguments[5:-2]]
    heal += ["--adapter", "full", "--loss", "logits", "--hold-back", "0.2", "--evaluate-every", "4"]
    subprocess.run([sys.executable, "-m", "lftpipe", *train], check=True, timeout=240)
    subprocess.run(
        [sys.executable, "-m", "lftpipe", *heal, "--run", str(tmp_path / "one")], check=True, timeout=240
    )
    status, out, lines = torchrun("-m", "--", "lftpipe", *heal, "--run", str(tmp_path / "two"))
    assert (status, lines) == (0, [])
    assert out.count("next: lftpipe evaluate") == 1
    one, two = (
        [row.get("loss") or row["held_back_loss"] for row in log_of(tmp_path / run)] for run in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    "text",
    ["[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:2", "NCCL error"],
)
def test_an_error_of_the_exchange_between_processes_is_no_defect(monkeypatch, text):
    monkeypatch.setattr("lftpipe.cli.guard.launched", lambda: True)
    assert "do: see which process failed first, and run again with --resume" in line_of(RuntimeError(text))
    monkeypatch.setattr("lftpipe.cli.guard.launched", lambda: False)
    assert "defect" in line_of(RuntimeError(text))


#: lftpipe, in which the first process takes its time to delete what was there.
SLOW_TO_BEGIN = """
import os, sys, time
from lftpipe.training import several as begun
real = begun.begin
def begin(*given):
    time.sleep(3)
    real(*given)
begun.begin = begin
from lftpipe.cli.app import main
main()
"""


@pytest.mark.slow
def test_force_and_resume_under_torchrun_begin_again_in_every_process(arguments, tmp_path):
    """No process goes on from a checkpoint that the first one deletes."""
    dying, slow = tmp_path / "dying.py", tmp_path / "slow.py"
    dying.write_text(DYING)
    slow.write_text(SLOW_TO_BEGIN)
    assert torchrun("--", str(dying), "1", "7", *arguments)[0] != 0
    run = tmp_path / "run"
    assert (run / runs.CHECKPOINT).exists()
    status, _, lines = torchrun("--", str(slow), *arguments, "--resume", "--force")
    assert (status, lines) == (0, [])
    assert [row["step"] for row in log_of(run)] == list(range(1, 13))
