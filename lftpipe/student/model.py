"""The student as a transformers model: the teacher with a flow layer in place of each block.

The classes are the teacher's own, with other contents in their list of layers. So everything that
transformers does for the teacher's family (generation, beams, padding, checkpointing, moves of
device and dtype) it does for the student, by the same code.
"""

from typing import Any, ClassVar, cast

from torch import nn
from transformers import GPTNeoXForCausalLM, GPTNeoXModel, LlamaForCausalLM, LlamaModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from lftpipe.base.errors import RunError
from lftpipe.families.family import Family
from lftpipe.families.gpt_neox import GPT_NEOX
from lftpipe.families.llama import LLAMA
from lftpipe.student.config import FlowLayout, LatentFlowGPTNeoXConfig, LatentFlowLlamaConfig
from lftpipe.student.flow_layer import FlowLayer


class LatentFlow:
    """What makes a family's model a student; mixed in before the family's own class."""

    family: ClassVar[Family]
    config: Any
    training: bool
    # What was not tried is not promised.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _no_split_modules: set[str] | list[str] | None = ["FlowLayer"]  # noqa: RUF012 (read by transformers)

    @property
    def student_layers(self) -> nn.ModuleList:
        """Kept layers and flow layers, in order."""
        base = getattr(self, cast(Any, self).base_model_prefix, self)
        return getattr(base, self.family.model_layers)

    def set_steps(self, steps: int, solver: str | None = None) -> None:
        """Run every flow in `steps` steps from now on, by the same solver or another.

        A KV cache made before does not fit any more.

        Parameters
        ----------
        solver
            `euler` or `midpoint`; left out, the present one.

        Raises
        ------
        SettingsError
            If `steps` is below 1 or the solver unknown; the student stays as it was.
        """
        config = self.config
        before = (config.steps, config.solver)
        config.steps, config.solver = steps, solver or config.solver
        try:
            config.lay_out()
        except Exception:
            config.steps, config.solver = before
            raise
        self._number_slots()

    def _number_slots(self) -> None:
        """Tell every layer its place, or places, in the KV cache."""
        slot = 0
        for place, layer in zip(self.config.places(), self.student_layers, strict=True):
            if isinstance(layer, FlowLayer):
                slots = range(slot, slot + self.config.evaluations(place))
                layer.set_steps(self.config.steps, self.config.solver, slots)
            else:
                form = self.family.form(self.config, place)
                assert form is not None
                attention: Any = layer.get_submodule(form.attention.module)
                attention.layer_idx = slot
            slot += self.config.evaluations(place)

    def _replace_blocks(self) -> None:
        """Exchange the list of layers that the family's constructor made."""
        config: FlowLayout = self.config
        layers = nn.ModuleList(
            self.family.layer(config, place)
            if isinstance(place, int)
            else FlowLayer(self.family, config, place)
            for place in config.places()
        )
        setattr(self, self.family.model_layers, layers)
        self._number_slots()

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers has it, but a tensor that is missing, extra or misshapen is an error.

        Pickles are never loaded.
        """
        wants_report = options.pop("output_loading_info", False)
        # A mismatch that is reported has a name, one that is raised has none.
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            folder, *arguments, output_loading_info=True, **options
        )
        for kind in ("missing", "unexpected", "mismatched"):
            for name in sorted(map(str, report[f"{kind}_keys"])):
                raise RunError(f"{folder}: {kind} tensor {name}", "the student's tensors", "export it again")
        return (model, report) if wants_report else model


class LatentFlowGPTNeoXModel(LatentFlow, GPTNeoXModel):
    """The trunk of a GPT-NeoX student."""

    config_class = LatentFlowGPTNeoXConfig
    family = GPT_NEOX
    _can_record_outputs = {  # noqa: RUF012 (read by transformers)
        "hidden_states": [GPTNeoXLayer, FlowLayer],
        "attentions": GPTNeoXAttention,
    }

    def __init__(self, config: LatentFlowGPTNeoXConfig) -> None:
        super().__init__(config)
        self._replace_blocks()
        self.post_init()


class LatentFlowGPTNeoXForCausalLM(LatentFlow, GPTNeoXForCausalLM):
    """A GPT-NeoX student as a language model."""

    config_class = LatentFlowGPTNeoXConfig
    family = GPT_NEOX

    def __init__(self, config: LatentFlowGPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = LatentFlowGPTNeoXModel(config)
        self.post_init()


class LatentFlowLlamaModel(LatentFlow, LlamaModel):
    """The trunk of a Llama student."""

    config_class = LatentFlowLlamaConfig
    family = LLAMA
    _can_record_outputs = {  # noqa: RUF012 (read by transformers)
        "hidden_states": [LlamaDecoderLayer, FlowLayer],
        "attentions": LlamaAttention,
    }

    def __init__(self, config: LatentFlowLlamaConfig) -> None:
        super().__init__(config)
        self._replace_blocks()
        self.post_init()


class LatentFlowLlamaForCausalLM(LatentFlow, LlamaForCausalLM):
    """A Llama student as a language model."""

    config_class = LatentFlowLlamaConfig
    family = LLAMA

    def __init__(self, config: LatentFlowLlamaConfig) -> None:
        super().__init__(config)
        self.model = LatentFlowLlamaModel(config)
        self.post_init()
