"""The int8 codec: small, close everywhere, exact where it matters, and a proper codec of zarr's."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import zarr
from fake_states import environment, make_spec, states, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from zarr.codecs import Crc32cCodec

from lftpipe.store import Store, verify_store
from lftpipe.store.codec import decode, encode, encoded_bytes, widen
from lftpipe.store.zarr_codec import Int8Codec, register

ROOT = Path(__file__).parents[2]


def round_trip(values: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    out = np.empty(values.shape, dtype)
    decode(encode(values), out)
    return out


def nmse(values: np.ndarray, read: np.ndarray) -> float:
    exact = values.astype(np.float64)
    return float(((read - exact) ** 2).sum() / (exact**2).sum())


def llm_like(seed: int, positions: int = 512, features: int = 576) -> np.ndarray:
    """As measured on SmolLM2-135M: uneven channels, a sink of 25,000 in one channel, some strong tokens."""
    rng = np.random.default_rng(seed)
    spread, offset = np.exp(rng.normal(1, 1, features)), rng.normal(0, 3, features)
    values = rng.standard_t(8, (positions, features)) * spread + offset
    values[0] *= 40
    values[0, features // 2] = 25_000
    values[rng.integers(1, positions, 3), features // 3] = 940
    return values.astype(np.float16)


def test_sizes_and_errors_of_states_like_a_language_models():
    for seed in range(4):
        values = llm_like(seed)
        encoded = encode(values)
        assert encoded.nbytes <= 0.55 * values.nbytes
        read = round_trip(values)
        assert nmse(values, read) < 3e-5
        assert nmse(values[1:], read[1:]) < 3e-5
        assert read[0, 288] == values[0, 288]


def test_one_massive_activation_costs_the_others_nothing():
    """Without care it would set the scale of its channel and the mean of its position's neighbours."""
    values = np.random.default_rng(0).normal(0, 10, (512, 576)).astype(np.float16)
    massive = values.copy()
    massive[0, 507] = 28_000
    plain, spoilt = round_trip(values), round_trip(massive)
    assert spoilt[0, 507] == 28_000
    error, worse = (nmse(values[1:], read[1:]) for read in (plain, spoilt))
    assert worse < 1.01 * error < 3e-5


@given(
    arrays(
        np.float16,
        array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.floats(-65504, 65504, width=16) | st.sampled_from([0.0, 1.0, -65504.0, 65504.0, 6e-8]),
    )
)
@settings(deadline=None, max_examples=200)
def test_every_value_is_within_half_a_step_of_its_group(values):
    """The step is the scale, and the scale at most the group's largest distance from the mean over 127."""
    read = round_trip(values)
    wide = values.astype(np.float64)
    positions = np.arange(len(values)) // 32
    reach = 2 * np.abs(wide).max(axis=0)  # the mean lies among the values
    bound = np.stack([reach for _ in positions]) / 127 / 2 * 1.01 + 2.0**-24
    assert (np.abs(read - wide) <= bound).all()
    half = round_trip(values, np.float16)
    assert np.isfinite(half).all()
    np.testing.assert_allclose(half, np.clip(read, -65504, 65504), rtol=2**-11, atol=2.0**-25)
    assert len(encode(values)) <= encoded_bytes(values.shape[0], values.shape[1], values.size // 256)


@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 80), st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_outliers_are_exact_wherever_they_are(seed, positions, features, count):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (positions, features)).astype(np.float16)
    count = min(count, positions * features // 256)
    places = rng.choice(positions * features, count, replace=False)
    values.reshape(-1)[places] = rng.choice([-1, 1], count) * rng.uniform(3e3, 6e4, count)
    np.testing.assert_array_equal(round_trip(values).reshape(-1)[places], values.reshape(-1)[places])


@pytest.mark.parametrize("value", [0.0, 1.0, -65504.0, 65504.0, 6e-8, 0.1])
def test_constants_are_exact(value):
    values = np.full((40, 5), value, np.float16)
    np.testing.assert_array_equal(round_trip(values), values)


def test_scale_does_not_matter():
    """The relative error is the same for tiny and for huge states."""
    base = np.random.default_rng(0).normal(0, 1, (128, 64))
    errors = [nmse(v := (base * scale).astype(np.float16), round_trip(v)) for scale in (0.03, 1, 100, 9000)]
    assert max(errors) < 1.1 * min(errors) < 4e-5


def test_values_that_are_not_finite_have_no_code():
    for value in (np.nan, np.inf, -np.inf):
        values = np.ones((64, 8), np.float16)
        values[5, 3] = value
        with pytest.raises(ValueError, match="not finite have no int8 code"):
            encode(values)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_bytes_of_another_length_are_refused(cut):
    encoded = encode(np.ones((64, 8), np.float16))
    with pytest.raises(ValueError, match="bytes are no int8 chunk of 64 x 8 values"):
        decode(encoded[:cut], np.empty((64, 8), np.float16))


def test_every_finite_half_is_widened_exactly():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(widen(values[None])[0], values.astype(np.float32))


def test_a_store_of_int8_is_read_alike_by_us_and_by_zarr(tmp_path):
    spec = make_spec(dtype="int8", context=64, width=48)
    write(tmp_path / "states.zarr", spec)
    assert verify_store(tmp_path / "states.zarr").ok
    store, root = Store.open(tmp_path / "states.zarr"), zarr.open(tmp_path / "states.zarr", mode="r")
    for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
        for index, layer in enumerate(layers):
            read = store.read("train", layer, range(10), array=array)
            assert read.dtype == np.float16
            np.testing.assert_array_equal(root[f"train/{array}"][index], read)
            want = states(spec, "train", array, layer, range(10)).astype(np.float16)
            assert nmse(want, read) < 3e-5
            wide = store.read("train", layer, range(10), array=array, out=np.empty(read.shape, np.float32))
            np.testing.assert_array_equal(wide.astype(np.float16), read)
    (batch,) = (
        b
        for b, _ in zip(store.batches("train", [2], batch_size=3, seed=0, dtype="float32"), [0], strict=False)
    )
    assert batch.states[2].dtype == np.float32


def test_what_zarr_encodes_is_what_we_encode(tmp_path):
    register()
    values = llm_like(0, 64, 40)[None, None]
    array = zarr.create_array(
        tmp_path / "array", shape=(2, 3, 64, 40), chunks=(1, 1, 64, 40), dtype="float16",
        serializer=Int8Codec(), compressors=Crc32cCodec(), fill_value=0,
    )  # fmt: skip
    array[1:2, 2:3] = values
    assert (tmp_path / "array/c/1/2/0/0").read_bytes()[:-4] == encode(values[0, 0]).tobytes()
    np.testing.assert_array_equal(zarr.open(tmp_path / "array")[1, 2], round_trip(values[0, 0], np.float16))


def test_only_float16_of_positions_and_features_is_coded(tmp_path):
    register()
    for shape, dtype in (((8,), "float16"), ((8, 8), "float32")):
        with pytest.raises(ValueError, match=r"codes float16 with axes \(\.\.\., position, feature\)"):
            zarr.create_array(tmp_path / "array", shape=shape, dtype=dtype, serializer=Int8Codec())
    with pytest.raises(ValueError, match=r"not a configuration of lftpipe\.int8"):
        Int8Codec.from_dict({"name": "lftpipe.int8", "configuration": {"block": 3}})


def test_an_installed_lftpipe_is_found_by_zarr(tmp_path):
    """Zarr alone, with the entry points of pyproject.toml and no import of ours, reads the store."""
    write(tmp_path / "states.zarr", make_spec(dtype="int8", context=32))
    (tmp_path / "lftpipe-1.dist-info").mkdir()
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["zarr.codecs"]
    text = "[zarr.codecs]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
    (tmp_path / "lftpipe-1.dist-info/entry_points.txt").write_text(text)
    (tmp_path / "lftpipe-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: lftpipe\nVersion: 1\n"
    )
    program = "import sys, zarr; print(float(zarr.open(sys.argv[1], mode='r')['train/hidden'][2, 9, 31, 39]))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "states.zarr")],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == float(Store.open(tmp_path / "states.zarr").read("train", 3, [9])[0, 31, 39])
