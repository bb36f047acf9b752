"""The store as its users see it: what is written is what is read, by us, by zarr and by xarray."""

import os
import pickle
from pathlib import Path
from typing import Any

import fake_states
import numpy as np
import pytest
import xarray
import zarr
from fake_states import make_spec, states, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.storage import storage_of
from lftpipe.store import Store, StoreWriter
from lftpipe.store.shard import ChunkReader


@pytest.fixture(params=["float16", "float32"])
def spec(request):
    return make_spec(dtype=request.param)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "states.zarr"


def expected(spec, split, array, layer, sequences=None):
    sequences = range(spec.sequences[split]) if sequences is None else sequences
    return states(spec, split, array, layer, sequences).astype(spec.decoded_dtype)


def test_what_is_written_is_what_is_read(path, spec):
    write(path, spec)
    store = Store.open(path)
    for split, count in spec.sequences.items():
        assert store.num_sequences(split) == count
        np.testing.assert_array_equal(store.tokens(split), tokens(spec, split)[0])
        np.testing.assert_array_equal(store.document(split), tokens(spec, split)[1])
        for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
            for layer in layers:
                read = store.read(split, layer, range(count), array=array)
                np.testing.assert_array_equal(read, expected(spec, split, array, layer))


def test_any_sequences_are_read_into_the_callers_memory(path, spec):
    write(path, spec)
    wanted = [7, 0, 9, 7]
    out = np.empty((4, spec.context, spec.width), spec.decoded_dtype)
    assert Store.open(path).read("train", 2, wanted, out=out) is out
    np.testing.assert_array_equal(out, expected(spec, "train", "hidden", 2, wanted))
    np.testing.assert_array_equal(Store.open(path).tokens("train", wanted), tokens(spec, "train")[0][wanted])


def test_zarr_and_xarray_read_it_without_warnings(path, spec):
    write(path, spec)
    root: Any = zarr.open(path, mode="r")
    assert root.attrs["complete"] is True
    assert root.attrs["teacher"] == {"name": "fake", "revision": "a1"}
    assert root.attrs["layers"] == [0, 2, 3]
    assert {name for name, _ in root.members(max_depth=None)} >= {"train/hidden", "validation/attention"}
    for split in spec.sequences:
        dataset = xarray.open_zarr(path, group=split)
        assert dataset.hidden.dims == ("layer", "sequence", "position", "feature")
        assert dataset.attrs["layers"] == [0, 2, 3]
        for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
            assert root[f"{split}/{array}"].attrs["layers"] == list(layers)
            want = np.stack([expected(spec, split, array, layer) for layer in layers])
            np.testing.assert_array_equal(root[f"{split}/{array}"][:], want)
            np.testing.assert_array_equal(dataset[array].to_numpy(), want)
        np.testing.assert_array_equal(dataset.document.to_numpy(), tokens(spec, split)[1])


def test_zarr_writes_what_we_read(path, spec):
    write(path, spec)
    want = expected(spec, "train", "hidden", 3, range(10))[::-1] / 2
    root = zarr.open(path, mode="r+")
    root["train/hidden"][2, :] = want
    with pytest.raises(StoreError, match=r"hidden of train, shard 0: .* not the shard that was written here"):
        Store.open(path).read("train", 3, range(10))
    for index, first in enumerate(range(0, 10, spec.sequences_per_shard)):
        layout = spec.arrays["hidden"]
        shard = ChunkReader(storage_of(path), layout.file("train", index), layout.chunks_per_shard)
        for within, row in enumerate(want[first : first + spec.sequences_per_shard]):
            read = shard.read(layout.chunk_number(3, within)).view(spec.dtype)
            np.testing.assert_array_equal(read.reshape(row.shape), row)


def test_a_shard_is_byte_for_byte_what_zarr_writes_in_index_order(path, tmp_path):
    """Chunks put in the index's order give zarr-python's own file."""
    spec = make_spec(sequences={"train": 4}, attention_layers=())
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", *tokens(spec, "train"))
        (key,) = writer.pending()
        with writer.shard(key) as shard:
            for layer in spec.layers:
                shard.put("hidden", layer, 0, states(spec, "train", "hidden", layer, key.sequences))
        writer.finish()
    ours = (path / "train/hidden/c.0.0.0.0").read_bytes()
    array = zarr.open(path, mode="r+")["train/hidden"]
    array[:] = array[:]
    theirs = (path / "train/hidden/c.0.0.0.0").read_bytes()
    index = 16 * 3 * 4 + 4
    assert len(ours) == len(theirs)
    order = np.frombuffer(theirs[-index:-4], "<u8").reshape(-1, 2)
    assert b"".join(theirs[a : a + n] for a, n in order.tolist()) == ours[:-index]


def test_a_split_may_be_empty_and_attention_left_out(path):
    spec = make_spec(sequences={"train": 5, "validation": 0}, attention_layers=())
    write(path, spec)
    store = Store.open(path)
    assert store.num_sequences("validation") == 0
    assert store.tokens("validation").shape == (0, 6)
    assert xarray.open_zarr(path, group="validation").hidden.shape == (3, 0, 6, 40)
    with pytest.raises(StoreError, match=r"attention of layer 2 is not in .* hidden of layers 0, 2, 3"):
        store.read("train", 2, [0], array="attention")


def test_tokens_come_piece_by_piece_or_at_once(path, tmp_path):
    spec = make_spec(sequences={"train": 10})
    ids, document = tokens(spec, "train")
    with StoreWriter.open(path, spec) as writer:
        for first in (0, 4, 8):
            writer.put_tokens("train", ids[first : first + 4], document[first : first + 4], first)
    write(path, spec)
    write(tmp_path / "once", spec)
    assert fake_states.files(path) == fake_states.files(tmp_path / "once")


def test_tokens_must_not_leave_gaps(path):
    spec = make_spec(sequences={"train": 10})
    ids, documents = tokens(spec, "train")
    with (
        StoreWriter.open(path, spec) as writer,
        pytest.raises(ValueError, match="sequence 0 must be put before"),
    ):
        writer.put_tokens("train", ids[1:4], documents[1:4], 1)


def test_the_reader_says_what_it_has(path):
    write(path, make_spec())
    store = Store.open(path)
    assert (store.layers, store.attention_layers, store.context) == ((0, 2, 3), (2, 3), 6)
    assert (store.width, store.dtype, store.identity["seed"]) == (40, "float16", 0)
    with pytest.raises(StoreError, match="hidden of layer 1 is not in"):
        store.read("train", 1, [0])
    with pytest.raises(StoreError, match=r"split 'test' of .* one of train, validation"):
        store.num_sequences("test")
    for wrong in (-1, 10):
        with pytest.raises(IndexError, match=f"sequence {wrong} of 10 in train"):
            store.read("train", 0, [wrong])
    with pytest.raises(ValueError, match=r"out is float64 .* not a C-contiguous float16"):
        store.read("train", 0, [0], out=np.empty((1, 6, 40), np.float64))


def test_a_reader_can_be_sent_to_another_process(path):
    write(path, make_spec())
    store = pickle.loads(pickle.dumps(Store.open(path)))
    np.testing.assert_array_equal(
        store.read("train", 2, [1]), expected(make_spec(), "train", "hidden", 2, [1])
    )


def test_a_missing_store_is_refused(path):
    with pytest.raises(StoreError, match=r"there is no store .* run `lftpipe extract`"):
        Store.open(path)


def test_flipped_bytes_are_noticed_by_the_reader(path):
    write(path, make_spec())
    file = path / "train/hidden/c.0.1.0.0"
    whole = file.read_bytes()
    for place in (10, len(whole) - 30):  # in a chunk, in the index
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StoreError, match=r"hidden of train, shard 1: .* damaged .*lftpipe verify"):
            Store.open(path).read("train", 0, [4])
    os.truncate(file, 7)
    with pytest.raises(StoreError, match=r"hidden of train, shard 1: the index .* damaged"):
        Store.open(path).read("train", 0, [4])
    file.unlink()
    with pytest.raises(StoreError, match=r"hidden of train, shard 1: .*No such file"):
        Store.open(path).read("train", 0, [4])


def test_equal_stores_have_equal_fingerprints(path, tmp_path):
    write(path, make_spec())
    write(tmp_path / "same", make_spec(details={"lftpipe": "9.9"}))
    write(tmp_path / "other", make_spec(identity={"teacher": "another"}))
    prints = [Store.open(each).fingerprint for each in (path, tmp_path / "same", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "a store without states holds tokens alone"),
        ({"layers": (1, 1)}, "repeats a layer"),
        ({"dtype": "bfloat16"}, "dtype must be float16, float32 or int8, not 'bfloat16'"),
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"sequences": {"train": -1}}, "must not be negative"),
        ({"identity": {"layers": 3}}, "attributes given twice: layers"),
    ],
)
def test_specifications_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)
