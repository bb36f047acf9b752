"""Layers streamed from the checkpoint give what a whole trunk gives, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, extracted, randomise
from decoders import config_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.trunk import StreamedTrunk, Trunk

PLACES = torch.stack([torch.arange(16), torch.cat([torch.arange(7), torch.arange(9)]), torch.arange(16)])


def captured(trunk: Trunk) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    tokens = torch.randint(VOCABULARY, PLACES.shape, generator=torch.Generator().manual_seed(0))
    hidden: dict[int, Tensor] = {}
    attention: dict[int, Tensor] = {}
    trunk.run(
        tokens,
        PLACES,
        hidden=lambda layer, state: hidden.update({layer: state.clone()}),
        attention=lambda layer, state: attention.update({layer: state.clone()}),
    )
    return hidden, attention


def differing(teacher: Teacher, dtype: torch.dtype) -> list[tuple[str, int]]:
    """States and attention outputs that are not the trunk's to the bit."""
    whole = captured(Trunk(teacher, 3, dtype))
    streamed = captured(StreamedTrunk(teacher, 3, dtype, batch_sequences=3))
    return [
        (name, layer)
        for name, ours, theirs in zip(("hidden", "attention"), streamed, whole, strict=True)
        for layer in {**ours, **theirs}
        if not (layer in ours and layer in theirs) or not torch.equal(ours[layer], theirs[layer].float())
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_layers_are_the_trunks(teacher: Teacher, dtype: torch.dtype) -> None:
    assert differing(teacher, dtype) == []


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "granite"])
def test_so_it_is_for_derived_families(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path / name)
    assert differing(open_teacher(str(tmp_path / name), tmp_path), torch.float32) == []


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "int8"}, {"logits": 3, "compute_dtype": "bfloat16"}, {"compress": "blosc"}],
    ids=["float16", "int8", "logits", "blosc"],
)
def test_a_store_has_the_same_bytes_with_streamed_layers(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fingerprints = {
        Store.open(
            extracted(tmp_path / str(on), teachers["llama"], text_folder, stream_layers=on, **changes)
        ).fingerprint
        for on in (False, True)
    }
    assert len(fingerprints) == 1


def test_a_store_that_grew_has_the_same_bytes_with_streamed_layers(
    teachers: dict[str, Path], text_folder: Path, tmp_path: Path
) -> None:
    fingerprints = set()
    for on in (False, True):
        for sequences in (11, 48):
            path = extracted(
                tmp_path / str(on), teachers["llama"], text_folder, stream_layers=on, tokens=sequences * 32
            )
        fingerprints.add(Store.open(path).fingerprint)
    assert len(fingerprints) == 1
