"""What is stored is what the teacher computes; nothing is ever mixed, lost or half done."""

import dataclasses
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lftpipe.config.settings import ExtractSettings, InfoSettings
from lftpipe.corpus.packing import positions
from lftpipe.errors import CorpusError, LftpipeError, SettingsError, StoreError, TeacherError
from lftpipe.stages.extract import extract
from lftpipe.stages.info import info, summary
from lftpipe.store import ShardWriter, Slot, Store, verify_store

CONTEXT = 32


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return ExtractSettings(
        workspace=tmp_path,
        model=str(teachers["neox"]),
        corpus=str(text_folder),
        context=CONTEXT,
        tokens=40 * CONTEXT,
        validation_tokens=6 * CONTEXT,
        batch_tokens=4 * CONTEXT,
        compute_dtype="float32",
        dtype="float32",
        threads=1,
    )


def change(settings: ExtractSettings, **values: Any) -> ExtractSettings:
    return dataclasses.replace(settings, **values)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store that is data or metadata, by its path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "writer.lock"
    }


@pytest.mark.parametrize("name", ["neox", "neox-sequential", "llama"])
def test_a_stored_piece_is_what_the_teacher_computes_on_it_alone(settings, teachers, name):
    result = extract(change(settings, model=str(teachers[name])))
    store = Store.open(Path(result["store"]))
    model = AutoModelForCausalLM.from_pretrained(teachers[name], dtype=torch.float32).eval()
    pieces = 0
    for row in range(0, store.num_sequences("train"), 7):
        tokens, document = store.tokens("train")[row], store.document("train")[row]
        starts = [*np.flatnonzero(positions(document) == 0), CONTEXT]
        for start, stop in pairwise(starts):
            ids = torch.from_numpy(tokens[None, start:stop]).long()
            with torch.inference_mode():
                expected = model(ids, output_hidden_states=True).hidden_states
            for layer in range(model.config.num_hidden_layers):  # the last is after the final norm
                stored = store.read("train", layer, [row])[0, start:stop]
                np.testing.assert_allclose(stored, expected[layer][0].numpy(), rtol=1e-4, atol=1e-5)
            pieces += 1
    assert pieces > 6  # there were sequences of several pieces among them


def test_the_last_state_is_before_the_final_norm(settings, teachers):
    store = Store.open(Path(extract(settings)["store"]))
    model: Any = AutoModelForCausalLM.from_pretrained(teachers["neox"], dtype=torch.float32).eval()
    last = torch.from_numpy(store.read("train", 4, [0]))
    ids = torch.from_numpy(store.tokens("train")[:1]).long()
    places = torch.from_numpy(positions(store.document("train")[:1])).long()
    with torch.inference_mode():
        expected = model.gpt_neox(ids, position_ids=places, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.gpt_neox.final_layer_norm(last), expected, rtol=1e-4, atol=1e-4)
    assert (last - expected).abs().max() > 0.1


def test_splits_share_no_document(settings):
    store = Store.open(Path(extract(settings)["store"]))
    assert not set(store.document("train").ravel()) & set(store.document("validation").ravel())


@pytest.mark.parametrize(
    ("layers", "hidden", "attention"),
    [
        ("all", (0, 1, 2, 3, 4), (0, 1, 2, 3)),
        ("1,3", (1, 3), (1,)),
        ("0:3", (0, 1, 2), (0, 1)),
        ("2", (2,), ()),
    ],
)
def test_layers_chosen(settings, layers, hidden, attention):
    store = Store.open(Path(extract(change(settings, layers=layers))["store"]))
    assert (store.layers, store.attention_layers) == (hidden, attention)


def test_again_does_nothing(settings, monkeypatch):
    first = extract(settings)
    before = contents(Path(first["store"]))
    monkeypatch.setattr("lftpipe.extraction.produce.Trunk", None)  # the teacher cannot even be loaded
    monkeypatch.setattr("lftpipe.stages.extract.packing_of", None)  # nor is the corpus read
    again = extract(settings)
    assert again["already_complete"] and not first["already_complete"]
    assert contents(Path(again["store"])) == before


def test_growing_keeps_what_is_there(settings, tmp_path):
    small = Store.open(Path(extract(settings)["store"]))
    before = [small.read("train", layer, range(40)).copy() for layer in small.layers]
    large = Store.open(Path(extract(change(settings, tokens=60 * CONTEXT))["store"]))
    assert large.num_sequences("train") == 60
    for layer, state in zip(small.layers, before, strict=True):
        np.testing.assert_array_equal(large.read("train", layer, range(40)), state)
    fresh = change(settings, tokens=60 * CONTEXT, store=tmp_path / "fresh.zarr")
    whole = Store.open(Path(extract(fresh)["store"]))
    np.testing.assert_array_equal(whole.read("train", 4, range(60)), large.read("train", 4, range(60)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context": 16}, "context"),
        ({"dtype": "float16"}, "dtype"),
        ({"layers": "0:3"}, "layers"),
        ({"attention": False}, "attention_layers"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
    ],
)
def test_a_changed_setting_is_never_mixed_in(settings, changes, named):
    store = Path(extract(settings)["store"])
    before = contents(store)
    with pytest.raises(StoreError, match=named):
        extract(change(settings, **changes))
    assert contents(store) == before


def test_changed_weights_tokenizer_and_corpus_are_noticed(settings, tmp_path, teachers, text_folder):
    model, corpus = tmp_path / "model", tmp_path / "corpus"
    shutil.copytree(teachers["neox"], model)
    shutil.copytree(text_folder, corpus)
    mine = change(settings, model=str(model), corpus=str(corpus))
    extract(mine)
    weights = load_file(model / "model.safetensors")
    save_file(
        {**weights, "gpt_neox.final_layer_norm.bias": torch.ones(32)},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(StoreError, match="weights_digest"):
        extract(mine)
    shutil.copy(teachers["neox"] / "model.safetensors", model)
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    with pytest.raises(StoreError, match="tokenizer_digest"):
        extract(mine)
    shutil.copy(teachers["neox"] / "tokenizer.json", model)
    for path in corpus.iterdir():
        path.write_text(path.read_text().upper())
    assert extract(mine)["already_complete"]  # stored tokens are trusted
    with pytest.raises(StoreError, match="tokens"):
        extract(change(mine, check_corpus=True))
    with pytest.raises(StoreError, match="tokens"):  # more of them are to be made of the same text
        extract(change(mine, tokens=60 * CONTEXT))
    shutil.rmtree(corpus)
    shutil.copytree(text_folder, corpus)
    grown = change(mine, tokens=60 * CONTEXT, check_corpus=True)
    assert extract(grown)["tokens"]["train"] == 60 * CONTEXT
    assert extract(grown)["already_complete"]


def spawn(settings: ExtractSettings) -> subprocess.Popen[bytes]:
    arguments = [
        "--workspace", settings.workspace, "--model", settings.model, "--corpus", settings.corpus,
        "--context", settings.context, "--tokens", settings.tokens, "--validation-tokens",
        settings.validation_tokens, "--batch-tokens", settings.batch_tokens, "--threads", 1,
        "--compute-dtype", settings.compute_dtype, "--dtype", settings.dtype, "--logits", settings.logits,
    ]  # fmt: skip
    code = (
        "from lftpipe.cli.app import main; from lftpipe.extraction import plan; "
        "plan.SHARD_BYTES = 120_000; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "extract", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_never_killed(settings, tmp_path, monkeypatch, compute_dtype):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    settings = change(settings, tokens=60 * CONTEXT, compute_dtype=compute_dtype, logits=3)
    whole = contents(Path(extract(change(settings, workspace=tmp_path / "whole"))["store"]))
    assert sum("hidden/c." in name for name in whole) > 10
    killed = change(settings, workspace=tmp_path / "killed")
    store = tmp_path / "killed" / "neox" / "states.zarr"
    rng = random.Random(0)
    kills = 0
    for enough in (1, 3):  # kill it twice, after that many shards
        process = spawn(killed)
        while process.poll() is None and len(list(store.glob("train/hidden/c.*"))) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    if kills:
        with pytest.raises(StoreError, match="--resume"):
            Store.open(store)
    extract(killed)
    assert contents(store) == whole


def test_a_teacher_that_overflows_stops_the_run_and_names_the_place(settings, tmp_path, teachers):
    model = tmp_path / "hot"
    shutil.copytree(teachers["neox"], model)
    weights = load_file(model / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][5] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    hot = change(settings, model=str(model), dtype="float16")
    with pytest.raises(StoreError, match=r"hidden layer 2.*channel 5.*--dtype float32"):
        extract(hot)
    assert extract(change(hot, dtype="float32", force=True))["tokens"]["train"] == 40 * CONTEXT


def test_a_dry_run_writes_nothing_and_is_right(settings):
    for dtype in ("float16", "float32"):
        asked = change(
            settings, dtype=dtype, tokens=400 * CONTEXT, store=settings.workspace / f"{dtype}.zarr"
        )
        planned = extract(change(asked, dry_run=True))
        assert asked.store
        assert not asked.store.exists()
        written = extract(asked)
        # The corpus ends early, which the plan knows: it is a local one.
        assert planned["tokens"] == written["tokens"] != written["tokens_asked"]
        assert planned["bytes"] == pytest.approx(written["bytes"], rel=0.05)


def test_a_teacher_of_nan_is_reported_with_its_place_in_any_compute_dtype(settings, teachers, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(teachers["neox"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for compute_dtype in ("float32", "bfloat16"):
        asked = change(settings, model=str(folder), compute_dtype=compute_dtype, store=tmp_path / "nan.zarr")
        with pytest.raises(StoreError, match=r"nan in hidden layer 2, train sequence 0, position 0, channel"):
            extract(change(asked, force=True))


def test_a_run_that_does_not_fit_is_refused_before_it_starts(settings, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=256 * 2**20)  # just what is to be spared
    monkeypatch.setattr("lftpipe.extraction.plan.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"free.*room for it and 268.4 MB to spare.*--layers"):
        extract(change(settings, tokens=10**6))
    assert not list(settings.workspace.rglob("*.zarr"))


def test_an_interrupt_loses_nothing(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    from lftpipe.teacher.trunk import Trunk

    run, calls = Trunk.run, []

    def interrupted(self: Trunk, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        run(self, *arguments, **options)

    monkeypatch.setattr(Trunk, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(settings)
    done = len(list(settings.workspace.glob("*/states.zarr/*/hidden/c.*")))
    assert done > 0
    assert not list(settings.workspace.rglob("*.partial"))
    assert extract(settings)["tokens"]["train"] == 40 * CONTEXT
    assert len(calls) < 6 + 12  # what was done before was not done again


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "9:4"}, SettingsError, "4:9"),
        ({"layers": "0,17"}, SettingsError, "0 to 4"),
        ({"layers": "six"}, SettingsError, "6,18"),
        ({"context": 4096}, SettingsError, "--context 128"),
        ({"corpus": "nowhere.txt"}, CorpusError, "python-stdlib"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, error, message):
    with pytest.raises(error, match=message):
        extract(change(settings, **changes))
    assert not list(settings.workspace.rglob("*.zarr"))


def test_corpora_that_make_no_sense(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "short.txt").write_text("a word")
    for name in ("empty", "empty.txt", "binary.txt", "short.txt"):
        with pytest.raises(CorpusError, match=name):
            extract(change(settings, corpus=str(tmp_path / name)))
    assert not list(tmp_path.rglob("*.zarr"))


def test_errors_are_one_line_and_json_plain_results(settings):
    json.dumps(extract(settings))
    with pytest.raises(LftpipeError) as caught:
        extract(change(settings, layers="9:4"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(settings, teachers, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(teachers["neox"], model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: id_ + 100 * (id_ > 200) for word, id_ in vocabulary.items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        TeacherError, match=r"a tokenizer with token \d+ beside .* / expected: tokens below 320"
    ):
        extract(change(settings, model=str(model)))


def test_nothing_but_the_store_remains(settings, tmp_path):
    store = Path(extract(settings)["store"])
    assert list(store.parent.iterdir()) == [store]
    with pytest.raises(CorpusError, match="corpus"):
        extract(
            change(settings, store=tmp_path / "other/states.zarr", tokens=1, context=128, corpus=str(store))
        )
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())


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
    monkeypatch.setattr("lftpipe.extraction.produce.Head", None)
    store = Store.open(Path(extract(settings)["store"]))
    assert "logits" not in store.spec.to_json()  # as before there were any
    with pytest.raises(StoreError, match=r"holds no logits .* --logits 64"):
        store.logits("train", [0])
    with pytest.raises(StoreError, match="holds no logits"):
        store.batches("train", [0], batch_size=2, seed=0, with_logits=True)
    with pytest.raises(SettingsError, match="--logits 321 / expected: 0 to 320"):
        extract(change(settings, logits=321))


def test_the_error_of_bfloat16_is_that_between_two_stores(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    mine = change(settings, compute_dtype="bfloat16", layers="0:4")
    store = Store.open(Path(extract(mine)["store"]))
    exact = Store.open(Path(extract(change(settings, layers="0:4", store=tmp_path / "exact.zarr"))["store"]))
    assert "compute_error" not in exact.spec.details
    found = store.spec.details["compute_error"]
    assert (found["sequences"], found["tokens"]) == (4, 4 * CONTEXT)
    for array, layers in (("hidden", store.layers), ("attention", store.attention_layers)):
        for index, layer in enumerate(layers):
            ours, theirs = (each.read("train", layer, range(4), array=array) for each in (store, exact))
            for name, first in (("nmse", 0), ("nmse_without_first", 1)):
                expected = np.square(ours - theirs)[:, first:].sum() / np.square(theirs)[:, first:].sum()
                assert found[array][name][index] == pytest.approx(expected, rel=0.02, abs=1e-12)
    assert found["hidden"]["nmse"][0] == 0 < found["hidden"]["nmse"][-1] < 1e-3
    described = info(InfoSettings(workspace=tmp_path, target=store.path))
    assert described["compute_error"] == found
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(described))
    assert "NMSE to float32" in console.export_text()


def test_the_error_of_bfloat16_is_measured_once_in_a_stores_life(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    settings = change(settings, compute_dtype="bfloat16")
    write, calls = ShardWriter.write, []

    def interrupted(self: ShardWriter, slot: Slot) -> None:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        write(self, slot)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(settings)
    monkeypatch.setattr("lftpipe.extraction.produce.bf16_error", None)
    path = Path(extract(settings)["store"])
    found = Store.open(path).spec.details["compute_error"]
    extract(change(settings, tokens=60 * CONTEXT))
    (path / "manifest.json").unlink()
    extract(change(settings, tokens=60 * CONTEXT, repair=True))
    assert Store.open(path).spec.details["compute_error"] == found


@pytest.mark.parametrize("nth", [2, 5, 9])
def test_a_disk_that_fills_up_while_a_shard_is_committed_stops_the_run(settings, monkeypatch, nth):
    monkeypatch.setattr("lftpipe.extraction.plan.SHARD_BYTES", 120_000)
    seal, calls = ShardWriter.seal, []

    def full(self: ShardWriter) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return seal(self)

    monkeypatch.setattr(ShardWriter, "seal", full)
    with pytest.raises(StoreError, match="room for the whole store"):
        extract(settings)
    assert not list(settings.workspace.rglob("*.partial"))
    path = Path(extract(settings)["store"])
    assert verify_store(path).ok
    assert contents(path) == contents(
        Path(extract(change(settings, store=path.parent / "whole.zarr"))["store"])
    )
