"""Shards as tasks of a Ray cluster of two nodes, one of which is killed."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_states import environment
from safetensors.torch import load_file, save_file
from test_workers import CONTEXT, SETTINGS, change, contents, spawn, store_of
from waiting import wait_until

from lftpipe.base import executor
from lftpipe.base.errors import SettingsError
from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings

pytest.importorskip("ray")
# Ray leaves files and sockets open in the process that begins a cluster.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: Of each trial.
KILLS = int(os.environ.get("KILLS", "3"))
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, on this machine."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.add_node(**NODE)
        yield made
        made.shutdown()


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return ExtractSettings(
        workspace=tmp_path, model=str(teachers["neox"]), corpus=str(text_folder), **SETTINGS
    )


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=500)
    finally:
        process.kill()


def test_nodes_are_killed_and_the_store_is_the_serial_one(cluster, settings, tmp_path):
    extract(change(settings, workspace=tmp_path / "serial"))
    want = contents(tmp_path / "serial/neox/states.zarr")
    rng, killed = random.Random(0), 0
    process = spawn(settings, "--ray", cluster.address)
    store = store_of(settings)
    shards = sum("/hidden/c." in file for file in want)
    for kill in range(KILLS):
        wait_for = 1 + kill * shards // (KILLS + 1)
        wait_until(
            lambda wait_for=wait_for: (
                process.poll() is not None or len(list(store.glob("*/hidden/c.*.0"))) >= wait_for
            ),
            f"{wait_for} shards",
            seconds=240,
        )
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
            cluster.add_node(**NODE)
            killed += 1
    _, err = finish(process)
    assert process.returncode == 0, err
    print(f"| nodes of a Ray cluster | {killed} |")
    assert killed
    assert contents(store) == want


def test_a_task_whose_teacher_overflows_is_not_tried_again(cluster, settings, teachers, tmp_path):
    folder = tmp_path / "hot"
    shutil.copytree(teachers["neox"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][5] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    hot = change(settings, model=str(folder), tokens=8 * CONTEXT, workspace=tmp_path / "work")
    process = spawn(hot, "--ray", cluster.address)
    out, err = finish(process)
    assert (process.returncode, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "inf in hidden layer 2" in line
    assert "Traceback" not in err
    assert not list((tmp_path / "work").rglob("*.partial"))


def test_what_ray_says_of_a_node_that_died_is_not_on_stdout(monkeypatch, capsys):
    """`--json` has stdout to itself."""

    class Noisy:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

        def is_initialized(self) -> bool:
            return True

        def cluster_resources(self) -> dict[str, float]:
            sys.stdout.write("(raylet) The node has been marked dead\n")
            return {"CPU": 0.0}

    monkeypatch.setattr(executor, "_ray", Noisy)
    job = executor.Job(
        tasks=[], start=print, done=print, advance=print, size=len, place=executor.Place("cpu", 1)
    )
    with pytest.raises(SettingsError, match="no machine of 1 CPUs"):
        executor.execute(job, ray="local")
    out, err = capsys.readouterr()
    assert (out, "marked dead" in err) == ("", True)
