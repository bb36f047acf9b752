"""A plain export as GGUF, as llama.cpp's own `convert_hf_to_gguf.py` (not on PyPI) writes it."""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

#: By transformers' model type. GGUF has no architecture for flows.
ARCHITECTURES = {
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def convert(folder: Path, out: Path) -> None:
    """Write the model and tokenizer of `folder` to the file `out`, in float32.

    Raises
    ------
    ValueError
        If GGUF has no architecture of that type.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise ValueError(f"GGUF has no architecture for {config['model_type']}")
    heads, width, layers = (
        config[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    rotary, size = config["rope_parameters"], config.get("head_dim") or width // heads
    writer.add_rope_dimension_count(int(size * rotary.get("partial_rotary_factor", 1)))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_head_count(heads)
    if architecture is gguf.MODEL_ARCH.GPTNEOX:
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "query_key_value" in name:
            tensor = _by_kind(tensor, heads)
        elif "q_proj" in name and config["model_type"] == "llama":
            tensor = _interleaved(tensor, heads)
        elif "k_proj" in name and config["model_type"] == "llama":
            tensor = _interleaved(tensor, config["num_key_value_heads"])
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        writer.add_tensor(new, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _by_kind(tensor: Tensor, heads: int) -> Tensor:
    """Query, key and value of each head in turn, as all queries, all keys, all values."""
    split = tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
    return torch.cat([split[:, kind].flatten(0, 1) for kind in range(3)])


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Llama's rotary pairs, a half of a head apart in transformers, side by side."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, int]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"] if added["special"]}
    tokens |= special
    size = config["vocab_size"]
    kinds = [
        gguf.TokenType.CONTROL
        if index in special
        else gguf.TokenType.NORMAL
        if index in tokens
        else gguf.TokenType.UNUSED
        for index in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the splitting of `ByteLevel(use_regex=True)`
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
