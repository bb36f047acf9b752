"""The student: the teacher with blocks of layers replaced by flow layers, as a transformers model.

Importing this package registers `latent_flow_gpt_neox` and `latent_flow_llama` with transformers'
Auto classes, which know model types only by registration. It has no other effect.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lftpipe.student.config import Block, LatentFlowGPTNeoXConfig, LatentFlowLlamaConfig
from lftpipe.student.flow_layer import FlowLayer
from lftpipe.student.model import (
    LatentFlowGPTNeoXForCausalLM,
    LatentFlowGPTNeoXModel,
    LatentFlowLlamaForCausalLM,
    LatentFlowLlamaModel,
)

__all__ = [
    "Block",
    "FlowLayer",
    "LatentFlowGPTNeoXConfig",
    "LatentFlowGPTNeoXForCausalLM",
    "LatentFlowGPTNeoXModel",
    "LatentFlowLlamaConfig",
    "LatentFlowLlamaForCausalLM",
    "LatentFlowLlamaModel",
]

for _config, _model, _causal in (
    (LatentFlowGPTNeoXConfig, LatentFlowGPTNeoXModel, LatentFlowGPTNeoXForCausalLM),
    (LatentFlowLlamaConfig, LatentFlowLlamaModel, LatentFlowLlamaForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
