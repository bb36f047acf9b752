"""Which kinds of models are no teachers, and why."""

from typing import Any

from lftpipe.errors import TeacherError, foreign
from lftpipe.teacher.family import Family


def check_kind(config: Any, model: str) -> None:
    """Refuse by its config what is no decoder of text with weights as they were trained."""
    if getattr(config, "quantization_config", None):
        method = config.quantization_config
        method = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
        raise TeacherError(
            f"model {model}, quantised ({method or 'by a method it does not name'})",
            "weights in a floating-point format: a flow layer is trained from them",
            "name the original checkpoint, or a .gguf file, which is dequantised",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TeacherError(
            f"model {model} of type {config.model_type}, an encoder with a decoder",
            "a decoder alone: one residual stream from tokens to logits",
            "choose a decoder-only causal language model",
        )
    with foreign(
        TeacherError, f"model {model}", "a config that says which part reads text", "correct config.json"
    ):
        text = config.get_text_config(decoder=True)
    if text is not config:
        raise TeacherError(
            f"model {model} of type {config.model_type}, which reads more than text",
            f"its text part alone, a model of type {text.model_type}",
            "save that part as a folder of its own, or name a text-only checkpoint",
        )
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise TeacherError(
                f"model {model} of type {config.model_type} with {name} {value!r}",
                "a decoder whose config says layers, width and vocabulary",
                "choose a decoder-only causal language model",
            )


def check_attention(model: str, family: Family, config: Any, layers: tuple[int, ...]) -> None:
    """Refuse to store attention outputs of layers that add none to the residual stream."""
    for layer in layers:
        form = family.form(config, layer)
        if form is None or not form.is_attention:
            raise TeacherError(
                f"attention outputs of {model}, whose layer {layer} adds none to the residual stream",
                "layers with an attention branch",
                "pass --no-attention: states are stored all the same",
            )
