"""GPT-NeoX: Pythia and its kin. Parallel residual, LayerNorm with bias, rotary on part of a head."""

from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from lftpipe.families.family import Branch, Family, LayerForm

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layer=GPTNeoXLayer,
    frame=GPTNeoXRotaryEmbedding,
    norm=lambda config: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
    form=lambda config, index: LayerForm(
        attention=Branch("attention", norm="input_layernorm", output="attention.dense"),
        mlp=Branch("mlp", norm="post_attention_layernorm", output="mlp.dense_4h_to_h"),
        parallel=config.use_parallel_residual,
    ),
    layers_prefix="gpt_neox.layers",
    embedding_prefix="gpt_neox.embed_in",
    final_norm_prefix="gpt_neox.final_layer_norm",
    head_names=("lm_head.weight", "embed_out.weight"),
    cache_argument="layer_past",
    model_layers="layers",
    model_norm="final_layer_norm",
)
