"""The lossless codec: the same values, fewer bytes, Zarr's own codec, and the writer's promises."""

import subprocess
import sys

import numpy as np
import pytest
from fake_states import environment, make_spec, write
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.store import Store, verify_store
from lftpipe.store.codec import OVERHEAD, compress, decompress


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_compressed_store_is_read_alike_by_us_and_by_any_zarr(tmp_path, dtype):
    spec = make_spec(dtype=dtype, compression="blosc", context=64, width=48)
    write(tmp_path / "states.zarr", spec)
    write(tmp_path / "plain.zarr", make_spec(dtype=dtype, context=64, width=48))
    assert verify_store(tmp_path / "states.zarr").ok
    store, plain = Store.open(tmp_path / "states.zarr"), Store.open(tmp_path / "plain.zarr")
    assert store.fingerprint != plain.fingerprint
    for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
        for layer in layers:
            read = store.read("train", layer, range(10), array=array)
            np.testing.assert_array_equal(read, plain.read("train", layer, range(10), array=array))
            wide = store.read("train", layer, [3], array=array, out=np.empty((1, 64, 48), np.float32))
            np.testing.assert_array_equal(wide[0], read[3].astype(np.float32))
    # In a process that cannot import lftpipe.
    program = """
import sys, zarr, xarray
root = zarr.open(sys.argv[1], mode="r")
print(float(root["train/hidden"][2, 9, 31, 39]))
print(float(xarray.open_zarr(sys.argv[1], group="train").hidden[2, 9, 31, 39]))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "states.zarr")],
        env={**environment(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == 2 * [float(store.read("train", 3, [9])[0, 31, 39])]


def test_a_compressed_store_grows_and_is_repaired(tmp_path):
    path, options = tmp_path / "states.zarr", {"compression": "blosc", "context": 64, "width": 48}
    write(path, make_spec(**options, sequences={"train": 6, "validation": 3}))
    write(path, make_spec(**options))
    write(tmp_path / "at-once.zarr", make_spec(**options))
    grown, at_once = Store.open(path), Store.open(tmp_path / "at-once.zarr")
    for layer in grown.layers:
        read = (store.read("train", layer, range(10)) for store in (grown, at_once))
        np.testing.assert_array_equal(*read)
    shard = path / "train/hidden/c.0.0.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    report = verify_store(path)
    assert [damage.file for damage in report.damaged] == ["train/hidden/c.0.0.0.0"]
    write(path, make_spec(**options), repair=report)
    assert verify_store(path).ok


@given(st.integers(1, 80), st.integers(1, 40), st.sampled_from(["float16", "float32"]), st.integers(0, 99))
def test_compression_loses_nothing(positions, features, dtype, seed):
    values = np.random.default_rng(seed).normal(0, 30, (positions, features)).astype(dtype)
    encoded = np.frombuffer(compress(values), np.uint8)
    out = np.empty_like(values)
    decompress(encoded, out)
    np.testing.assert_array_equal(out, values)
    assert len(encoded) <= values.nbytes + OVERHEAD
    assert compress(values) == encoded.tobytes()


@given(st.integers(0, 400), st.integers(0, 200), st.integers(0, 99))
def test_what_is_no_compressed_chunk_is_refused(size, place, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(8, 8)).astype(np.float16)
    with pytest.raises(ValueError, match=r"no Blosc chunk|blosc|decompress"):
        decompress(rng.integers(0, 256, size).astype(np.uint8), np.empty_like(values))
    with pytest.raises(ValueError, match="no Blosc chunk of 256 bytes"):
        decompress(np.frombuffer(compress(values), np.uint8), np.empty((8, 16), np.float16))


def test_a_store_without_compression_is_what_it_was():
    assert "compression" not in make_spec().to_json()
    assert make_spec(compression="blosc").to_json()["compression"] == "blosc"
    for wrong in ({"compression": "gzip"}, {"compression": "blosc", "dtype": "int8"}):
        with pytest.raises(ValueError, match="compression must be none, or blosc of floats"):
            make_spec(**wrong)
