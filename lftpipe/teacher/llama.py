"""Llama: sequential residual, RMSNorm without bias, rotary on whole heads. SmolLM2 is one."""

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from lftpipe.teacher.family import Family

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layer=LlamaDecoderLayer,
    rotary=LlamaRotaryEmbedding,
    norm=lambda config: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps),
    parallel_residual=lambda config: False,
    layers_prefix="model.layers",
    embedding_prefix="model.embed_tokens",
    final_norm_prefix="model.norm",
    head_names=("lm_head.weight",),
    attention_norm="input_layernorm",
    attention="self_attn",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    attention_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    cache_argument="past_key_values",
    model_layers="layers",
    model_norm="norm",
)
