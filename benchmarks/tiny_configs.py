"""A tiny config of any decoder of transformers, by what the fields of its config are called."""

import re
from collections.abc import Iterator
from typing import Any

VOCABULARY, WIDTH, LAYERS = 320, 32, 4

#: The first pattern that a field's name matches says its value; None leaves the field as it is.
RULES: tuple[tuple[str, Any], ...] = (
    (r"token_id|_id$", 0),
    (r"^vocab_size|vocab_size_per|padded_vocab", VOCABULARY),
    (r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers)$", LAYERS),
    (r"^(hidden_size|n_embd|d_model|dim|embedding_size|embed_dim|input_dim|lru_width)$", WIDTH),
    (r"^(attention_hidden_size|word_embed_proj_dim)$", WIDTH),
    (r"intermediate|ffn_dim|n_inner|ffn_hidden|inner_dim|moe_dim|shared_expert_.*size", 48),
    (r"^mamba_d_ssm$", 64),
    (r"mamba_n_heads|mamba_num_heads|^num_heads_ssm|^n_mamba_heads$", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"mamba_d_state|ssm_state_size|^state_size|mamba_d_state", 8),
    (r"mamba_n_groups|^n_groups$", 1),
    (r"dt_rank|time_step_rank", 4),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", 4),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"qk_head_dim", 12),
    (r"lora_rank|low_rank|rank_dim|_rank$", 8),
    (r"linear_num_(key|value)_heads", 4),
    (r"linear_(key|value)_head_dim|head_dim|attention_head_size|kv_channels|d_kv", 8),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|kv_heads", 2),
    (r"num_attention_heads|^num_heads$|^n_heads?$|attention_heads", 4),
    (r"experts_per_tok|num_selected|top_?k(?!_group)|moe_k|num_experts_per", 2),
    (r"n_shared_experts|num_shared_expert", 1),
    (r"num_local_experts|n_routed_experts|num_experts|n_experts|moe_num_experts", 4),
    (r"^n_group$|topk_group", 1),
    (r"first_k_dense|num_dense_layers|moe_layer_start", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|context_length|n_ctx|max_target|seq_length", 128),
    (r"sliding_window$|window_size|attention_chunk_size|local_attention", 8),
)

#: Further changes that are tried one after the other, until the model can be built and run.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"intermediate_size": 64},
    {"intermediate_size": 64, "num_heads": 8, "head_dim": 8},
    {"head_dim": 4},
    {"head_dim": 4, "num_key_value_heads": 4},
    {"head_dim": 16},
    {"head_dim": 32, "num_attention_heads": 1, "num_key_value_heads": 1},
    {"num_key_value_heads": 1},
    {"num_hidden_layers": 6},
    {"num_hidden_layers": 8},
)


def tiny_configs(kind: Any) -> Iterator[Any]:
    """Configs of a class to try, the likeliest first.

    Parameters
    ----------
    kind
        A config class of transformers.
    """
    default = kind().to_dict()
    for variant in VARIANTS:
        if any(name not in default for name in variant):
            continue
        values = {name: _value(name, value) for name, value in default.items()}
        values |= variant
        layers = values.get("num_hidden_layers") or values.get("n_layer") or LAYERS
        count = default.get("num_hidden_layers") or default.get("n_layer") or default.get("num_layers")
        for name, value in default.items():
            if isinstance(value, list) and len(value) == count and "token" not in name:
                values[name] = _some_of(value, layers)
        for name in ("model_type", "transformers_version", "architectures", "dtype"):
            values.pop(name, None)
        rotary = values.get("rope_parameters") or {}
        if not any(isinstance(each, dict) for each in rotary.values()):  # one for each kind of layer
            values.pop("rope_parameters", None)
        values = {name: value for name, value in values.items() if not _is_config(value)}
        try:
            yield kind(**values)
        except Exception:  # of the config's own checks
            continue


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "transformers_version" in value


def _value(name: str, value: Any) -> Any:
    if value is None and re.search(r"n_routed_experts", name):
        return 4
    if value is None and re.search(r"num_experts_per_tok|n_group$|topk_group", name):
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return 0 if value is None and re.search(r"^(pad|bos|eos)_token_id$", name) else value
    return next((to for pattern, to in RULES if re.search(pattern, name) and to is not None), value)


def _some_of(values: list[Any], count: int) -> list[Any]:
    """So many of a list, one of each kind among them."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = values[:count]
    missing = [value for value in values if str(value) not in set(map(str, first))]
    if missing and len(kinds) > 1:
        first[-1] = missing[0]
    return first
