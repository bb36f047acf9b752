"""However many processes compute, and whichever dies: the store is that of one process, to the byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from extractions import change, contents
from fake_states import environment
from safetensors.torch import load_file, save_file
from waiting import wait_until

from lftpipe.base.errors import LftpipeError, SettingsError, StoreError
from lftpipe.cli.app import main, with_values
from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings
from lftpipe.extraction.array_job import parse_part
from lftpipe.store import Store, read_plan, verify_store

SETTINGS: dict[str, Any] = {
    "context": CONTEXT,
    "tokens": 60 * CONTEXT,
    "validation_tokens": 6 * CONTEXT,
    "batch_tokens": 4 * CONTEXT,
    "compute_dtype": "bfloat16",
    "logits": 3,
    "shard_bytes": 90_000,
    "threads": 1,
}


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return ExtractSettings(
        workspace=tmp_path, model=str(teachers["neox"]), corpus=str(text_folder), **SETTINGS
    )


@pytest.fixture(scope="module")
def serial(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], text_folder: Path
) -> dict[str, bytes]:
    """Of a store that one process made."""
    folder = tmp_path_factory.mktemp("serial")
    options = {"workspace": folder, "model": str(teachers["neox"]), "corpus": str(text_folder)}
    return contents(Path(extract(ExtractSettings(**options, **SETTINGS))["store"]))


def spawn(settings: ExtractSettings, *more: str, **environ: str) -> subprocess.Popen[str]:
    """`lftpipe extract` as one types it."""
    command = [sys.executable, "-m", "lftpipe", "extract", "--json", *more]
    for name, value in (*SETTINGS.items(), ("model", settings.model), ("corpus", settings.corpus)):
        command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.Popen(
        [*command, "--workspace", str(settings.workspace)],
        env={**environment(), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def store_of(settings: ExtractSettings) -> Path:
    return settings.workspace / "neox/states.zarr"


def children(pid: int) -> list[int]:
    """Worker processes of a driver."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for each in map(int, listed) if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.mark.slow
def test_workers_make_the_same_store(settings, serial):
    result = extract(change(settings, workers=2))
    assert contents(Path(result["store"])) == serial
    assert sum("hidden/c." in file for file in serial) >= 8  # there was something to share
    assert extract(settings)["already_complete"]


def test_parts_in_any_order_make_the_same_store(settings, serial):
    results = [extract(change(settings, part=part)) for part in ("3/3", "1/3")]
    assert [result["complete"] for result in results] == [False, False]
    assert extract(change(settings, part="1/3"))["already_complete"]  # again: nothing is computed
    with pytest.raises(StoreError, match="--resume"):
        Store.open(store_of(settings))
    last = extract(change(settings, part="2/3"))
    assert last["complete"]
    assert contents(store_of(settings)) == serial
    assert extract(change(settings, part="2/3"))["already_complete"]  # a late one finds it complete


def test_extract_without_a_part_completes_what_parts_have_begun(settings, serial, monkeypatch):
    extract(change(settings, part="2/2"))
    before = {path.name for path in store_of(settings).rglob("*.partial")}
    assert before
    computed = []
    from lftpipe.extraction.forward import Passes

    run = Passes.run
    monkeypatch.setattr(
        Passes, "run", lambda self, keys, *rest: run(self, (computed.append(k) or k for k in keys), *rest)
    )
    extract(settings)
    assert contents(store_of(settings)) == serial
    total = sum("hidden/c." in file for file in serial)
    assert len(computed) == (total + 1) // 2


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_part_env_reads_who_it_is(monkeypatch, names):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="RANK and WORLD_SIZE"):
        parse_part("env")
    for name, value in zip(names, ("2", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert parse_part("env") == (3, 8)
    assert parse_part("8/8") == (8, 8)
    for wrong in ("0/8", "9/8", "8", "a/b", "-1/2"):
        with pytest.raises(SettingsError, match="from 1 to N"):
            parse_part(wrong)


def test_part_env_reads_a_slurm_array(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    array = {"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10"}
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", **array}.items():
        monkeypatch.setenv(name, value)
    assert parse_part("env") == (2, 4)


@pytest.mark.parametrize(
    "given", [{"workers": 2, "part": "1/2"}, {"workers": 2, "ray": "local"}, {"part": "1/2", "ray": "local"}]
)
def test_ways_to_spread_the_work_exclude_each_other(settings, given):
    with pytest.raises(SettingsError, match="one way to spread the work"):
        extract(change(settings, **given))


@pytest.mark.slow
def test_a_worker_whose_teacher_overflows_is_not_tried_again(settings, teachers, tmp_path, capfd):
    folder = tmp_path / "hot"
    shutil.copytree(teachers["neox"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][5] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LftpipeError, match="inf in hidden layer 2"):
        extract(change(settings, model=str(folder), workers=2))
    assert "Traceback" not in capfd.readouterr().err
    assert not list((tmp_path / "hot").rglob("*.partial"))


def test_a_plan_is_frozen_while_states_are_computed_and_gone_afterwards(settings):
    extract(change(settings, part="1/2"))
    plan = read_plan(store_of(settings))
    assert plan is not None
    assert (plan["epoch"], plan["kind"], plan["spec"]["sequences"]) == (
        1,
        "cpu",
        {"train": 60, "validation": 6},
    )
    extract(settings)
    assert read_plan(store_of(settings)) is None


def die_and_go_on(settings: ExtractSettings, rng: random.Random, whom: str, delay: float) -> bool:
    """Kill the driver or a worker once, and let it run to its end; whether anybody was killed."""
    process = spawn(settings, "--workers", "2")
    store, killed = store_of(settings), False
    wait_until(
        lambda: process.poll() is not None or list(store.glob("train/hidden/c.*")),
        "the first shard",
        seconds=120,
    )
    time.sleep(rng.uniform(0, delay))
    if process.poll() is None:
        victims = [process.pid] if whom == "driver" else children(process.pid)
        if victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
            killed = True
    out, err = process.communicate(timeout=300)
    if whom == "worker":
        assert process.returncode == 0, err
        assert json.loads(out)["tokens"]["train"] == 60 * CONTEXT
    else:
        extract(settings)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_killed_once_the_store_is_the_serial_one(settings, serial, whom):
    die_and_go_on(settings, random.Random(1), whom, 0.1)
    assert contents(store_of(settings)) == serial
    assert verify_store(store_of(settings)).ok


@pytest.mark.long
@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_killed_at_thirty_random_moments_the_store_is_the_serial_one(settings, serial, tmp_path, whom):
    rng, killed = random.Random(0), 0
    for moment in range(15):
        here = change(settings, workspace=tmp_path / f"{moment}")
        killed += die_and_go_on(here, rng, whom, 0.5)
        assert contents(store_of(here)) == serial, moment
        shutil.rmtree(here.workspace)
    assert killed >= 10


def test_ray_needs_no_address():
    assert with_values(["extract", "--ray", "--json"]) == ["extract", "--ray=local", "--json"]
    assert with_values(["extract", "--ray"]) == ["extract", "--ray=local"]
    given = ["extract", "--ray", "auto", "--model", "m"]
    assert with_values(given) == given
    assert with_values([]) == []


def test_the_command_takes_ray_without_an_address(settings, monkeypatch, capsys):
    options = ["--workspace", str(settings.workspace), "--model", settings.model, "--ray", "--part", "1/2"]
    monkeypatch.setattr(sys, "argv", ["lftpipe", "extract", *options])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "--part with --ray / expected: one way to spread the work" in capsys.readouterr().err
