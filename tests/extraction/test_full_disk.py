"""A disk that fills while shards are written ends the run, within seconds and with one line."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import disk_faults
import pytest
import torch
from fake_states import environment, files, make_spec, states, tokens

from lftpipe.extraction.async_writer import Background, Open
from lftpipe.store import Store, StoreWriter, produce_shard, verify_store


def opening(writer: StoreWriter) -> Open:
    return lambda key: produce_shard(writer.path, writer.spec, key, f"a{key.split}{key.index}")


SPEC = make_spec(sequences={"train": 6, "validation": 3})


def extract(path: Path, fail_at: int) -> tuple[int, bool, str]:
    """Disk operations of the shards, whether it ended, and its error; as `forward` calls the threads."""
    done: dict[str, str] = {}
    with StoreWriter.open(path, SPEC) as writer:
        for split in SPEC.sequences:
            writer.put_tokens(split, *tokens(SPEC, split))
        with disk_faults.counted(fail_at, disk_faults.disk_full) as count:

            def run() -> None:
                try:
                    with Background(opening(writer), writer.commit) as background:
                        for key in writer.pending():
                            background.begin_shard(key)
                            for array, layers in (
                                ("hidden", SPEC.layers),
                                ("attention", SPEC.attention_layers),
                            ):
                                for layer in layers:
                                    block = states(SPEC, key.split, array, layer, key.sequences)
                                    background.put(array, layer, 0, torch.from_numpy(block))
                            background.end_shard()
                    done["error"] = ""
                except BaseException as error:
                    done["error"] = f"{type(error).__name__}: {error}"

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(20)
        if "error" in done and not done["error"]:
            writer.finish()
    return count[0], not thread.is_alive(), done.get("error", "")


@pytest.mark.slow
def test_no_disk_operation_that_fails_makes_extraction_wait_for_ever(tmp_path):
    total, ended, error = extract(tmp_path / "whole", 0)
    assert (ended, error) == (True, "")
    assert total > 30
    for number in range(1, total + 1):
        path = tmp_path / f"{number}"
        _, ended, error = extract(path, number)
        assert ended, f"waits for ever after operation {number} of {total}"
        assert "StoreError" in error, number
        assert "No space left on device" in error, number
        assert extract(path, 0)[1:] == (True, "")  # room again: it goes on
        assert files(path) == files(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("kilobytes", range(120, 1000, 80))
def test_extract_on_a_small_disk_ends_with_one_line(tmp_path, teachers, text_folder, kilobytes):
    if not disk_faults.small_disk(tmp_path / "disk", f"{kilobytes}k"):
        pytest.skip("only root may mount a small tmpfs")
    command = (
        *(sys.executable, "-c", CODE, "extract", "--model", str(teachers["neox"]), "--corpus"),
        *(str(text_folder), "--context", "32", "--tokens", "4096", "--validation-tokens", "224"),
        *("--workspace", str(tmp_path / "disk"), "--compute-dtype", "float32"),
    )

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment()}
        )

    try:
        done = run()
        assert done.returncode == 1, done.stdout
        (line,) = done.stderr.strip().splitlines()[-1:]
        assert line.startswith("error: given: ")
        assert "No space left on device" in line
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path / "disk")], check=True)
        done = run()
        assert done.returncode == 0, done.stderr
        (store,) = (tmp_path / "disk").glob("*/states.zarr")
        assert verify_store(store).ok
        assert Store.open(store).num_sequences("train") == 128
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


#: The room asked for beforehand would refuse such a disk; here it is to run full.
CODE = """
import shutil, sys
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(1 << 40, 0, 1 << 40)
from lftpipe.cli.app import main
main()
"""


def test_an_error_of_the_caller_is_the_one_told(tmp_path):
    with (  # noqa: PT012
        StoreWriter.open(tmp_path / "states.zarr", SPEC) as writer,
        pytest.raises(ValueError, match="the caller's"),
        Background(opening(writer), writer.commit) as background,
    ):
        background.begin_shard(writer.pending()[0])
        raise ValueError("the caller's")
    assert not list((tmp_path / "states.zarr").rglob("*.partial"))
