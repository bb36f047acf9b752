"""A model's structure, found by running it on meta tensors; the kinds of models that we take."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe.base.errors import TeacherError, foreign, reason_of
from lftpipe.families import meta_model
from lftpipe.families.attention import AttentionContext
from lftpipe.families.family import Family, LayerForm
from lftpipe.families.forward_args import Frame
from lftpipe.families.layer_probe import find_form

# --- Which kinds of models are no teachers, and why.


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


# --- A family found by the structure of its model, rather than by its name.
#
# transformers builds the model without weights; its list of layers, what it calls them with, their
# branches, the final norm and the head are read off from that. What does not fit is refused with the
# reason.

#: Names of a KV cache, or a state, among a layer's arguments.
CACHES = ("past_key_values", "layer_past", "past_key_value", "cache_params", "state")


class Logits(nn.Module):
    """What a language model makes of normed states: its head, with any scale, soft-cap or bias.

    The model's own forward pass runs around a base model that only hands the states on.
    """

    def __init__(self, model: Any, base: str) -> None:
        super().__init__()
        self.handed = _Handed(model.get_submodule(base))
        model.set_submodule(base, self.handed)
        self.model = model

    def get_output_embeddings(self) -> nn.Module | None:
        """The model's map from features to tokens."""
        return self.model.get_output_embeddings()

    def forward(self, states: Tensor) -> Tensor:
        """Logits of normed states `(..., feature)`."""
        self.handed.states = states.reshape(1, -1, states.shape[-1])
        ids = torch.zeros(self.handed.states.shape[:2], dtype=torch.long, device=states.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.reshape(*states.shape[:-1], logits.shape[-1])


class _Handed(nn.Module):
    """In the place of the base model: its output is what it was given beforehand."""

    def __init__(self, stands_for: nn.Module) -> None:
        super().__init__()
        self._stands_for = [stands_for]  # in a list, so that it is no part of this module
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)  # models read a multiplier there, say

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output(self.states)


class _Output:
    """What a base model returns, with nothing in it but states."""

    def __init__(self, states: Tensor | None) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Structure:
    """A model without weights, taken apart.

    Raises `TeacherError` if it is no decoder with one list of layers.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.model, self.implementation = _first_that_builds(config)
        self.path = meta_model.layers_path(self.model)
        self.layers: Any = self.model.get_submodule(self.path)
        base = self.model.base_model
        self.base_prefix = "" if base is self.model else f"{self.model.base_model_prefix}."
        self.without_flow: str | None = None
        """Why there are no flow layers for it."""
        self.final_norm: str | None = None
        self._forms: dict[int, LayerForm | None] = {}
        self._frame: Frame | None = None
        try:
            self._frame = Frame(config, self.implementation)
            self._arguments = self._frame.arguments(torch.arange(4)[None])
            self.final_norm = self._frame.final_norm
            if self.final_norm is None:
                self.without_flow = "between the last layer and the head is more than one norm"
            elif self._frame.reads_embedding:
                self.without_flow = "its layers read the tokens, beside states and positions"
        except Exception as error:  # of the model's own code, which may be anything
            self.without_flow = reason_of(error)

    @property
    def arity(self) -> int:
        """How many values its layers return beside the states."""
        return 0 if self._frame is None else self._frame.recorders[0].arity

    @property
    def caches(self) -> bool:
        """Whether every layer keeps keys and values by an index, as transformers' caches want it."""
        forms = [self.form(index) for index in range(len(self.layers))]
        return all(
            form is not None
            and form.is_attention
            and any(name == CACHES[0] or name == "layer_past" for name, _ in form.attention.arguments)
            and any(hasattr(part, "layer_idx") for part in layer.modules())
            for form, layer in zip(forms, self.layers, strict=True)
        )

    def looks_at_length(self, longest: int) -> bool:
        """See `Frame.looks_at_length`."""
        return self._frame is not None and self._frame.looks_at_length(longest)

    @property
    def four_positions(self) -> AttentionContext:
        """The context of one sequence of four positions."""
        return AttentionContext(torch.arange(4)[None], self._arguments)

    def form(self, index: int) -> LayerForm | None:
        """The branches of a layer."""
        if self._frame is None:
            return None
        if index not in self._forms:
            width = self.config.hidden_size
            with torch.device("cpu"):  # whatever is built around the call
                self._forms[index] = find_form(self.layers[index], self._arguments[index], width)
        return self._forms[index]

    def frame(self) -> nn.Module:
        """The model around its layers."""
        if self._frame is None:
            raise TeacherError(
                f"a {self.config.model_type} model ({self.without_flow})",
                "layers that can be run alone",
                "extract and recouple work; flow layers do not",
            )
        return Frame(self.config, self.implementation)

    def layer(self, index: int) -> nn.Module:
        """One layer, on the meta device."""
        return copy.deepcopy(self.layers[index])

    def norm(self) -> nn.Module:
        """The final norm, on the meta device."""
        assert self.final_norm is not None, self.without_flow
        return copy.deepcopy(self.model.get_submodule(self.base_prefix + self.final_norm))

    def head(self) -> Logits:
        """From normed states to logits, on the meta device."""
        around = self.path.rpartition(".")[0]
        return Logits(meta_model.build(self.config, self.implementation), around)

    def family(self) -> Family:
        """Everything that the rest of lftpipe asks of it."""
        arguments = getattr(self, "_arguments", {0: {}})[0]
        return Family(
            name=self.config.model_type,
            layer=lambda config, index: self.layer(index),
            frame=lambda config: self.frame(),
            norm=lambda config: self.norm(),
            form=lambda config, index: self.form(index),
            layers_prefix=self.path,
            final_norm_prefix=self.base_prefix + (self.final_norm or ""),
            cache_argument=next((name for name in CACHES if name in arguments), CACHES[0]),
            model_layers=self.path.removeprefix(self.base_prefix),
            model_norm=self.final_norm or "",
            head=lambda config: self.head(),
            without_flow=self.without_flow,
        )


def _first_that_builds(config: Any) -> tuple[Any, str]:
    error: Exception | None = None
    for implementation in meta_model.IMPLEMENTATIONS:
        try:
            model = meta_model.build(config, implementation)
            if implementation == "eager" or meta_model.takes_any_attention(model):
                return model, implementation
        except Exception as raised:  # of the model's own constructor
            error = error or raised
    assert error is not None
    raise TeacherError(
        f"a model of type {config.model_type} ({reason_of(error)})",
        "a config that transformers builds a causal language model from",
        "correct config.json, or choose another model",
    )


#: By the text of the config.
_STRUCTURES: dict[str, Structure] = {}
_MOST_STRUCTURES = 8


def structure_of(config: Any) -> Structure:
    """The structure of a config's model; models of equal configs share it.

    Raises `TeacherError` if the model is no decoder with one list of layers.
    """
    text = config.to_json_string(use_diff=False)
    if text not in _STRUCTURES:
        with torch.device("cpu"), torch.no_grad():  # whatever is built around the call
            found = Structure(config)
        while len(_STRUCTURES) >= _MOST_STRUCTURES:
            del _STRUCTURES[next(iter(_STRUCTURES))]
        _STRUCTURES[text] = found
    return _STRUCTURES[text]


def per_layer_lists(config: Any) -> dict[str, list[Any]]:
    """What a teacher's config says of each of its layers, by field."""
    count = config.num_hidden_layers
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == count and "token" not in name
    }
