"""What is stored is what the teacher computes; nothing is ever mixed, and what is there is kept."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT
from extractions import change, contents, small_extraction
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import CorpusError, StoreError
from lftpipe.commands.extract import extract, summary
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.packing import positions
from lftpipe.store import Store


@pytest.fixture
def settings(tmp_path: Path, teachers: dict[str, Path], text_folder: Path) -> ExtractSettings:
    return small_extraction(tmp_path, teachers["neox"], text_folder)


@pytest.mark.parametrize("name", ["neox", "neox-sequential", "llama"])
def test_a_stored_segment_is_what_the_teacher_computes_on_it_alone(settings, teachers, name):
    result = extract(change(settings, model=str(teachers[name])))
    store = Store.open(Path(result["store"]))
    model = AutoModelForCausalLM.from_pretrained(teachers[name], dtype=torch.float32).eval()
    segments = 0
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
            segments += 1
    assert segments > 6  # there were sequences of several segments among them


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
    monkeypatch.setattr("lftpipe.extraction.shard_job.Trunk", None)  # the teacher cannot even be loaded
    monkeypatch.setattr("lftpipe.commands.extract.packing_of", None)  # nor is the corpus read
    again = extract(settings)
    assert again["already_complete"]
    assert not first["already_complete"]
    assert contents(Path(again["store"])) == before


def test_a_first_store_of_tokens_alone_is_not_said_to_have_been_complete_already(settings):
    tokens = change(settings, tokens_only=True)
    first, again = extract(tokens), extract(tokens)
    assert not first["already_complete"]
    assert "complete already" not in str(summary(first))
    assert "tokens/s" not in str(summary(first))  # no teacher ran
    assert again["already_complete"]
    assert "it was complete already" in str(summary(again))
    grown = change(tokens, tokens=tokens.tokens + 8 * CONTEXT)
    assert not extract(grown)["already_complete"]
    assert extract(grown)["already_complete"]


def test_a_part_that_stored_the_tokens_is_not_said_to_have_been_complete_already(settings):
    tokens = change(settings, tokens_only=True, part="1/2")
    assert not extract(tokens)["already_complete"]
    assert extract(tokens)["already_complete"]


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


def test_nothing_but_the_store_remains(settings, tmp_path):
    store = Path(extract(settings)["store"])
    assert list(store.parent.iterdir()) == [store]
    with pytest.raises(CorpusError, match=r"manifest\.json, line 1"):
        extract(
            change(settings, store=tmp_path / "other/states.zarr", tokens=1, context=128, corpus=str(store))
        )
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
