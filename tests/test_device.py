"""A stage computes where and with what it is told, and leaves its caller's process as it was."""

import ctypes
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from training_runs import change, short_run

from lftpipe.base import executor
from lftpipe.base.device import (
    CopyStream,
    in_float64,
    on_device,
    own_gpu,
    prepared,
    resolve_compute_dtype,
    synchronize,
)
from lftpipe.base.errors import SettingsError
from lftpipe.commands.toy import toy
from lftpipe.commands.train import train
from lftpipe.config.settings import ToySettings, TrainSettings

#: In a process of its own: what every call of the allocator's settings was.
COUNTED = """
import ctypes, sys
calls = []
class Libc:
    def __init__(self, real):
        self.mallopt = lambda *given: calls.append(given)
real = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: Libc(real) if name is None else real(name, *rest, **more)
"""


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    return short_run(stores["neox"], tmp_path, tokens=4 * 32, threads=torch.get_num_threads() + 1)


def state() -> tuple[int, bytes]:
    return torch.get_num_threads(), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_leaves_threads_and_random_state_as_they_were(settings, fails):
    before = state()
    if fails:
        with pytest.raises(SettingsError, match="--walk-steps"):
            train(change(settings, walk_steps=0))
    else:
        train(settings)
    assert state() == before


def test_every_stage_that_takes_threads_restores_them():
    """Those that compute are marked, and the mark is the one place that sets them."""
    stages = Path(__file__).parents[1] / "lftpipe/commands"
    marked = {path.stem for path in stages.glob("*.py") if "@on_device\n" in path.read_text()}
    assert marked == {
        *(
            "compress",
            "evaluate",
            "export",
            "extract",
            "fuse",
            "generate",
            "heal",
            "plan",
            "recognise",
            "sweep",
        ),
        *("toy", "train"),
    }
    setting = [
        path.relative_to(stages.parent).as_posix()
        for path in stages.parent.rglob("*.py")
        if "set_num_threads" in path.read_text()
    ]
    assert sorted(setting) == ["base/device.py", "teacher/thread_pool.py"]  # which restores them too


def test_a_stage_without_a_device_restores_threads_too(tmp_path):
    before = state()
    toy(ToySettings(workspace=tmp_path, steps=2, threads=before[0] + 1))
    assert state() == before


def test_threads_are_set_within_and_restored_after_an_error():
    before = torch.get_num_threads()

    @on_device
    def stage(settings: ToySettings) -> None:
        assert torch.get_num_threads() == before + 2
        raise KeyError

    with pytest.raises(KeyError):
        stage(ToySettings(threads=before + 2))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cuda:99", "mps", "nowhere"])
def test_a_device_that_is_not_there_is_refused_and_nothing_changes(device):
    before = state()
    with (
        pytest.raises(SettingsError, match=rf"--device {device} / expected: a device of this machine: cpu"),
        prepared(device, before[0] + 1),
    ):
        pass
    assert state() == before


@pytest.mark.slow
def test_the_allocator_is_the_callers(settings, tmp_path):
    """What glibc is told cannot be undone: only a process that is ours tells it anything."""
    command = "from lftpipe.commands.toy import toy; from lftpipe.config.settings import ToySettings; "
    command += f"toy(ToySettings(workspace={str(tmp_path / 'a')!r}, steps=1)); assert not calls, calls"
    subprocess.run([sys.executable, "-c", COUNTED + command], check=True, timeout=60)
    command = "from lftpipe.cli.app import main; sys.argv = ['lftpipe', '--version']\n"
    command += "try: main()\nexcept SystemExit: pass\nassert len(calls) == 3, calls"
    subprocess.run([sys.executable, "-c", COUNTED + command], check=True, timeout=60)


def test_a_process_that_shares_the_work_keeps_freed_memory(monkeypatch):
    called: list[tuple[int, int]] = []
    libc = type("Libc", (), {"mallopt": lambda _, *given: called.append(given)})()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(executor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(executor.threading.Thread, "start", lambda _: None)
    ours, theirs = multiprocessing.Pipe()
    ours.close()  # the driver has ended
    executor._work(theirs, lambda _: lambda tasks, *_: list(tasks), executor.Place("cpu", None))
    assert len(called) == 3


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cuda"),
        ({"LOCAL_RANK": "1"}, "cuda:1"),
        ({"SLURM_LOCALID": "5"}, "cuda:1"),
        ({"LOCAL_RANK": ""}, "cuda"),
    ],
)
def test_cuda_is_the_gpu_that_a_launcher_gives_this_process(monkeypatch, environment, expected):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_gpu("cuda") == expected
    assert own_gpu("cuda:0") == "cuda:0"
    assert own_gpu("cpu") == "cpu"


def test_bfloat16_is_asked_of_the_card_that_computes_and_not_emulated(monkeypatch):
    asked: list[Any] = []

    @contextmanager
    def current(device: str) -> Iterator[None]:
        asked.append(device)
        yield
        asked.append(None)

    def supported(*, including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation  # as a T4 says

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_compute_dtype("auto", "cuda:1") is torch.float32
    assert asked == ["cuda:1", False, None]


def test_copies_are_waited_for_by_the_stream_of_their_own_card(monkeypatch):
    device, asked = torch.device("cuda:1"), []
    stream = Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or stream)
    tensor = Mock(spec=torch.Tensor)
    CopyStream(device).arrive(Mock(spec=torch.cuda.Event), [tensor])
    assert asked == [device]
    tensor.record_stream.assert_called_once_with(stream)


def test_the_clock_waits_for_the_card_that_computes(monkeypatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(torch.device("cuda:1"))
    synchronize(torch.device("cpu"))
    assert waited == [torch.device("cuda:1")]


def test_nobody_asks_for_the_current_card():
    """A stage passes its device everywhere: threads begin with the first card as their current one."""
    asks = re.compile(
        r"cuda\.(synchronize|current_stream|Stream|get_device_\w+|current_device|empty_cache)\(\)"
    )
    sources = (Path(__file__).parents[1] / "lftpipe").rglob("*.py")
    assert not [path.name for path in sources if asks.search(path.read_text())]


class OnMps(torch.Tensor):
    """On the processor, but it says that it is elsewhere, and has no float64 there."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("mps")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def double(self, *_: Any, **__: Any) -> torch.Tensor:
        raise TypeError("no float64 on mps")


def test_sums_in_float64_are_made_on_the_processor_where_a_device_has_none():
    x = torch.tensor([1.0, 2.0]).as_subclass(OnMps)
    assert in_float64(x).dtype == torch.float64
    assert in_float64(torch.ones(2)).dtype == torch.float64
