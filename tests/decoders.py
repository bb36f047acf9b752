"""Tiny decoders of many families with random weights: what the laws of teachers and students are tried on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WIDTH, LAYERS = 320, 32, 4

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

#: Windows are shorter than the sequences of the tests: what lies beyond a window must be right too.
WINDOW = {"sliding_window": 6}

TWO_KINDS = ["sliding_attention", "full_attention"] * 2

#: What makes a family special, by its model type.
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": WINDOW,
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 3.0, "embedding_multiplier": 5.0},
    "olmo2": {},
    "gemma2": WINDOW | {"head_dim": 8, "layer_types": TWO_KINDS, "final_logit_softcapping": 1.0},
    "gemma3_text": WINDOW | {"head_dim": 8, "layer_types": TWO_KINDS},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": WIDTH},
}

#: Of every kind of branch, norm, position and cache one; `make slow` tries the other families.
EVERYDAY = ("gpt2", "gemma2", "smollm3", "mixtral", "mamba2", "rwkv")

#: All families for a test or a fixture.
FAMILIES = [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]

#: They hand out hidden states from the second on.
LATE = ("mamba2", "rwkv")

#: Layers that are taken as a whole, and add no attention output to the stream.
WHOLE = {"mamba2": range(LAYERS), "rwkv": range(1)}

#: Of no meaning to Mamba 2.
UNKNOWN = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")


def config_of(name: str) -> Any:
    """The config of one of `DECODERS`."""
    unknown = UNKNOWN if name == "mamba2" else ()
    common = {key: value for key, value in COMMON.items() if key not in unknown}
    return AutoConfig.for_model(name, **(common | DECODERS[name]))


def make_decoders(root: Path, names: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder in transformers' format for some of `DECODERS`."""
    for name in names:
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
        randomise(model)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in names}


def make_bloom(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny Bloom, whose layers are made of no two branches."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}
    config = AutoConfig.for_model("bloom", **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
