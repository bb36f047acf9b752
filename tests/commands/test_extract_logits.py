"""The teacher's largest logits in a store: the model's own, and kept like states."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT
from extractions import change, contents, small_extraction
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.packing import positions
from lftpipe.store import Store, verify_store


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return small_extraction(tmp_path, teachers["neox"], text_folder)


def test_logits_are_the_models_own_largest(settings, teachers):
    settings = change(settings, layers="1,2", logits=7)
    planned = extract(change(settings, dry_run=True))
    result = extract(settings)
    sizes, tokens = planned["bytes_by_array"], sum(result["tokens"].values())
    assert (sizes["logit_values"], sizes["logit_ids"], sizes["logit_normaliser"]) == (
        tokens * 7 * 4,
        tokens * 7 * 4,
        tokens * 4,
    )
    store = Store.open(Path(result["store"]))
    assert (store.layers, store.spec.logits) == ((1, 2), 7)
    values, ids, normaliser = store.logits("train")
    model = AutoModelForCausalLM.from_pretrained(teachers["neox"], dtype=torch.float32).eval()
    rows = slice(0, 8)
    tokens, places = store.tokens("train")[rows], positions(store.document("train")[rows])
    with torch.inference_mode():
        logits = model(
            torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(places).long(), use_cache=False
        ).logits
    logits = logits - logits.max(-1, keepdim=True).values
    top, own = logits.topk(7)
    np.testing.assert_allclose(values[rows], top.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        logits.gather(-1, torch.from_numpy(ids[rows]).long()).numpy(), values[rows], rtol=1e-4, atol=1e-4
    )
    assert (ids[rows] == own.numpy()).mean() > 0.99  # but for ties
    np.testing.assert_allclose(normaliser[rows], logits.logsumexp(-1).numpy(), rtol=1e-5, atol=1e-5)
    assert (np.exp(values - normaliser[..., None]).sum(-1) < 1).all()
    assert (np.diff(values, axis=-1) <= 0).all()
    batch = next(store.batches("train", [1], batch_size=3, seed=0, with_logits=True))
    assert batch.logits is not None
    np.testing.assert_array_equal(batch.logits.ids, ids[batch.sequences])
    np.testing.assert_array_equal(store.logits("train", [5]).values, values[[5]])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_logits_grow_and_are_repaired_like_states(settings, monkeypatch, dtype):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 60_000)
    settings = change(settings, logits=5, dtype=dtype)
    path = Path(extract(settings)["store"])
    before, small = contents(path), Store.open(path).logits("train")
    assert small.values.dtype == np.float16
    assert (np.exp(small.values - small.normaliser[..., None]).sum(-1) < 1.01).all()
    damaged = path / "train/logit_ids/c.1.0.0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [
        str(damage) for damage in verify_store(path).damaged if "logit_ids of train, shard 1" in str(damage)
    ]
    extract(change(settings, repair=True))
    assert contents(path) == before
    with pytest.raises(StoreError, match="logits: 5 -> None"):
        extract(change(settings, logits=0))
    extract(change(settings, tokens=60 * CONTEXT))
    large = Store.open(path).logits("train", range(len(small.ids)))
    for old, new in zip(small, large, strict=True):
        np.testing.assert_array_equal(old, new)


def test_without_logits_no_head_is_loaded_and_a_store_says_so(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.shard_job.Head", None)
    store = Store.open(Path(extract(settings)["store"]))
    assert "logits" not in store.spec.to_json()  # as before there were any
    with pytest.raises(StoreError, match=r"holds no logits .* --logits 64"):
        store.logits("train", [0])
    with pytest.raises(StoreError, match="holds no logits"):
        store.batches("train", [0], batch_size=2, seed=0, with_logits=True)
    with pytest.raises(SettingsError, match="--logits 321 / expected: 0 to 320"):
        extract(change(settings, logits=321))


def test_in_float16_logits_near_minus_100_give_the_models_probabilities(settings, teachers, tmp_path):
    """A head that adds the same to all logits of a position changes no probability."""
    folder = tmp_path / "far"
    shutil.copytree(teachers["neox"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["embed_out.weight"] += 50 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = extract(change(settings, model=str(folder), layers="1,2", logits=7, dtype="float16"))
    store = Store.open(Path(result["store"]))
    values, ids, normaliser = (torch.from_numpy(each[:8]) for each in store.logits("train"))
    tokens, places = store.tokens("train")[:8], positions(store.document("train")[:8])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(
            torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(places).long(), use_cache=False
        ).logits
    assert logits.max(-1).values.abs().median() > 50
    exact = logits.log_softmax(-1).gather(-1, ids.long())
    assert (values.float() - normaliser[..., None] - exact).abs().max() < 2e-3
    assert (values[..., 0] == 0).all()
