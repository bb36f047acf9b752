"""Who is one of several processes, and how long they wait for one another."""

import os
import subprocess
import sys

import pytest
from training_runs import short_run

from lftpipe.base import progress
from lftpipe.commands.train import train

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "2"},
        {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "SLURM_PROCID": "2"},
        {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "many", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
    ],
)
def test_world_size_without_a_launcher_trains_alone(stores, tmp_path, monkeypatch, left):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert train(short_run(stores["neox"], tmp_path, tokens=4 * 32))["steps"] == 1
    assert progress.speaks()


def test_of_the_processes_of_a_launcher_the_first_speaks(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert not progress.speaks()
    monkeypatch.setenv("RANK", "0")
    assert progress.speaks()


#: Processes that are given two seconds for an exchange, and of which the first works for five before it.
PATIENT = """
import time, datetime
import torch.distributed as dist
real = dist.init_process_group
dist.init_process_group = lambda backend: real(backend, timeout=datetime.timedelta(seconds=2))
from lftpipe.training import distributed
distributed.join("cpu")
if distributed.rank() == 0:
    time.sleep(5)
assert distributed.agree("made" if distributed.rank() == 0 else None) == "made"
if distributed.rank() == 0:
    time.sleep(5)
distributed.wait()
distributed.leave()
"""


@pytest.mark.slow
def test_processes_wait_for_the_first_longer_than_for_an_exchange(tmp_path):
    """Nccl gives up after ten minutes, in which a map need not be made."""
    script = tmp_path / "patient.py"
    script.write_text(PATIENT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script)], capture_output=True, text=True, timeout=120, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
