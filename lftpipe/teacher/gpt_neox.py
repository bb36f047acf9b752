"""GPT-NeoX: Pythia and its kin. Parallel residual, LayerNorm with bias, rotary on part of a head."""

from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from lftpipe.teacher.family import Family

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layer=GPTNeoXLayer,
    rotary=GPTNeoXRotaryEmbedding,
    norm=lambda config: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
    parallel_residual=lambda config: config.use_parallel_residual,
    layers_prefix="gpt_neox.layers",
    embedding_prefix="gpt_neox.embed_in",
    final_norm_prefix="gpt_neox.final_layer_norm",
    head_names=("lm_head.weight", "embed_out.weight"),
    attention_norm="input_layernorm",
    attention="attention",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    attention_output="attention.dense",
    mlp_output="mlp.dense_4h_to_h",
    cache_argument="layer_past",
    model_layers="layers",
    model_norm="final_layer_norm",
)
