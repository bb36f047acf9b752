"""Llama: sequential residual, RMSNorm without bias, rotary on whole heads. SmolLM2 is one."""

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from lftpipe.families.family import Branch, Family, LayerForm

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layer=LlamaDecoderLayer,
    frame=LlamaRotaryEmbedding,
    norm=lambda config: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps),
    form=lambda config, index: LayerForm(
        attention=Branch("self_attn", norm="input_layernorm", output="self_attn.o_proj"),
        mlp=Branch("mlp", norm="post_attention_layernorm", output="mlp.down_proj"),
    ),
    layers_prefix="model.layers",
    embedding_prefix="model.embed_tokens",
    final_norm_prefix="model.norm",
    head_names=("lm_head.weight",),
    cache_argument="past_key_values",
    model_layers="layers",
    model_norm="norm",
)
