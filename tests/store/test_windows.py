"""Windows of a rolling store: where they lie, how large they are, how many shards fit under a cap."""

from dataclasses import replace

import numpy as np
import pytest
from fake_states import make_spec, tokens

from lftpipe.base.errors import SettingsError
from lftpipe.store import StoreWriter, window_shards
from lftpipe.store.windows import Windows, most_bytes

#: Ten shards of four sequences, the last with two, in windows of two shards.
SPEC = make_spec(rolling=2, sequences={"train": 38, "validation": 3})
SHARD = most_bytes(SPEC, 4)
STAYS = most_bytes(SPEC, 3)
CAP = STAYS + 4 * SHARD


def test_the_cap_holds_two_windows():
    spec = replace(SPEC, rolling=0)
    assert window_shards(spec, CAP) == 2
    assert window_shards(spec, CAP + 2 * SHARD) == 3
    assert window_shards(spec, CAP + 2 * SHARD, own=1) == 1
    least = STAYS + 2 * SHARD
    assert window_shards(spec, least) == 1
    with pytest.raises(SettingsError, match=rf"--rolling {least - 1} / expected: at least {least}: "):
        window_shards(spec, least - 1)
    with pytest.raises(SettingsError, match=f"at least {CAP}: .* two windows of 2 shards / do: give more$"):
        window_shards(spec, CAP - 1, own=2)


@pytest.mark.parametrize("form", [{"dtype": "int8"}, {"compression": "blosc"}, {"logits": 3}])
def test_no_shard_is_larger_than_reckoned(form, tmp_path):
    path = tmp_path / "states.zarr"
    spec = make_spec(**form, sequences={"train": 4, "validation": 0})
    noise = np.random.default_rng(0).integers(0, 2**15 - 2**10, (4, 6, 40)).astype(np.int16).view(np.float16)
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", *tokens(spec, "train"))
        with writer.shard(writer.pending()[0]) as shard:
            for array, layers in (("hidden", spec.layers), ("attention", spec.attention_layers)):
                for layer in layers:
                    shard.put(array, layer, 0, noise)
            if spec.logits:
                ranked = np.zeros((4, 6, 3), np.float32)
                shard.put("logit_values", None, 0, ranked)
                shard.put("logit_ids", None, 0, ranked.astype(np.int32))
                shard.put("logit_normaliser", None, 0, ranked[..., 0])
    files = [file for file in path.glob("train/*/c.*") if file.parent.name not in ("tokens", "document")]
    size = sum(file.stat().st_size for file in files)
    assert 0.5 * most_bytes(spec, 4) < size <= most_bytes(spec, 4)


def test_windows_follow_one_another_through_all_epochs():
    windows = Windows(SPEC)
    assert (windows.sequences, windows.count) == (8, 5)
    assert [windows.number(position) for position in (0, 7, 8, 37, 38, 46)] == [0, 0, 1, 4, 5, 6]
    assert [windows.end(number) for number in (0, 4, 5)] == [8, 38, 46]
    assert [(key.index, key.sequences) for key in windows.keys(9)] == [(8, range(32, 36)), (9, range(36, 38))]
