"""Students of derived families: classes made from the teacher's own, when they are needed.

As with GPT-NeoX and Llama the classes are transformers' for the teacher, with other contents in their list of
layers. Layers that are kept, and those that flow layers are made of, come out of a model that the teacher's
own constructor builds.
"""

import copy
import inspect
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lftpipe.base.errors import TeacherError
from lftpipe.families.attention import Arguments, AttentionContext
from lftpipe.families.family import Family
from lftpipe.families.structure import Structure, structure_of
from lftpipe.student.config import Block, FlowLayout
from lftpipe.student.flow_layer import FlowLayer, number_layer
from lftpipe.student.model import LatentFlow

#: Model types of students begin with it.
PREFIX = "latent_flow_"

#: Fields of a student's config that its teacher's does not have.
FIELDS: dict[str, tuple[Any, Any]] = {
    "teacher_layers": (int, 1),
    "blocks": (list | None, None),
    "solver": (str, "midpoint"),
    "steps": (int, 3),
    "teacher_lists": (dict | None, None),
}


class DerivedLayout(FlowLayout):
    """Adds to `FlowLayout` what configs say of each layer, such as its kind of attention."""

    teacher_lists: dict[str, list[Any]] | None

    def lay_out(self) -> None:
        """As `FlowLayout` has it, and a value for each place, then for each further evaluation of a flow."""
        super().lay_out()
        places = self.places()
        origins = [place if isinstance(place, int) else place.start for place in places]
        counts = [self.evaluations(place) for place in places]
        more = [origin for origin, count in zip(origins, counts, strict=True) for _ in range(count - 1)]
        for name, values in (self.teacher_lists or {}).items():
            setattr(self, name, [values[origin] for origin in origins + more])

    def __post_init__(self, **kwargs: Any) -> None:
        self.lay_out()
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def teacher_config(self) -> Any:
        """The config of the teacher."""
        config: Any = self
        plain = config.to_dict()
        for key in (*FIELDS, "model_type", "architectures", "transformers_version", "num_hidden_layers"):
            plain.pop(key, None)
        plain |= self.teacher_lists or {}
        kind: Any = CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)]
        teacher = kind(**plain, num_hidden_layers=self.teacher_layers)
        teacher._attn_implementation = config._attn_implementation
        return teacher


class DerivedFlowLayer(FlowLayer):
    """A flow layer that is called as the layers of its family are.

    Parameters
    ----------
    layer
        The teacher's first layer there, as its own constructor builds it.
    arity
        How many values layers of the family return beside the states.
    """

    def __init__(self, family: Family, config: Any, block: Block, layer: nn.Module, arity: int) -> None:
        super().__init__(family, config, block, layer)
        self._stands_for = [layer]
        self._arity = arity
        self._signature = inspect.signature(layer.forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stands_for" not in self.__dict__:
                raise
            return getattr(self.__dict__["_stands_for"][0], name)  # models read `layer.attention_type`, say

    def forward(self, *given: Any, **named: Any) -> Any:
        """From the block's start to its end.

        Parameters
        ----------
        *given, **named
            As the family's own layer takes them; of them only the cache is looked at.
        """
        arguments = dict(self._signature.bind(*given, **named).arguments)
        states: Tensor = arguments.pop(next(iter(self._signature.parameters)))
        for parameter in self._signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        out = self.carry(states, self._contexts_of(states, arguments))
        return out if self._arity == 0 else (out, *[None] * (self._arity - 1))

    def _contexts_of(self, states: Tensor, arguments: Arguments) -> Any:
        cache = arguments.get(self.cache_argument)
        nothing = torch.empty(0, device=states.device)
        places = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        for context in self._contexts(AttentionContext((nothing, nothing), None, places), cache):
            seen = dict(arguments) | ({} if cache is None else {self.cache_argument: context.cache})
            yield AttentionContext(context.rotary, None, places, layers={self.block.start: seen})


class DerivedLatentFlow(LatentFlow):
    """A student of a derived family; mixed in before the family's own language model."""

    teacher_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        teacher_config = config.teacher_config()
        structure = structure_of(teacher_config)
        refuse_without_flow(structure, config.model_type.removeprefix(PREFIX))
        self.family: Family = structure.family()  # pyright: ignore[reportIncompatibleVariableOverride]
        built = self.teacher_class(copy.deepcopy(teacher_config)).get_submodule(structure.path)
        layers = [
            built[place]
            if isinstance(place, int)
            else DerivedFlowLayer(self.family, teacher_config, place, built[place.start], structure.arity)
            for place in config.places()
        ]
        self.set_submodule(structure.path, nn.ModuleList(layers))  # pyright: ignore[reportAttributeAccessIssue]
        self.caches = structure.caches
        if not self.caches:
            config.use_cache = False
        self._number_slots()
        self.post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def generate(self, *given: Any, **options: Any) -> Any:
        """As transformers has it; without a cache where layers keep more than keys and values."""
        if not self.caches:
            options["use_cache"] = False
        return super().generate(*given, **options)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def student_layers(self) -> nn.ModuleList:
        """Kept layers and flow layers, in order."""
        return self.get_submodule(self.family.layers_prefix)  # pyright: ignore

    def _number_slots(self) -> None:
        """The first evaluation of each place has the place's own slot, further ones have those at the end.

        So what the config says of each slot, such as its window, is the same for place and slot.
        """
        further = len(self.config.places())
        for index, (place, layer) in enumerate(zip(self.config.places(), self.student_layers, strict=True)):
            if isinstance(layer, FlowLayer):
                slots = [index, *range(further, further + self.config.evaluations(place) - 1)]
                layer.set_steps(self.config.steps, self.config.solver, slots)
                further += len(slots) - 1
                continue
            number_layer(layer, index)


def refuse_without_flow(structure: Structure, name: str) -> None:
    """Refuse students of families that have no flow layers."""
    if structure.without_flow:
        raise TeacherError(
            f"a student of a {name} model", f"flow layers, but {structure.without_flow}", "choose another"
        )


@lru_cache
def student_class(model_type: str) -> Any:
    """The student's class for a teacher's model type, registered with transformers' Auto classes.

    Raises
    ------
    TeacherError
        If transformers has no causal language model of that type.
    """
    try:
        config_class: Any = CONFIG_MAPPING[model_type]
        teacher_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError as error:
        raise TeacherError(
            f"a model of type {model_type}", "a causal language model of transformers", "choose another"
        ) from error
    name = f"LatentFlow{teacher_class.__name__}"
    fields = {key: value for key, (_, value) in FIELDS.items()}
    annotations = {key: kind for key, (kind, _) in FIELDS.items()}
    config: Any = type(
        f"LatentFlow{config_class.__name__}",
        (DerivedLayout, config_class),
        {
            "model_type": PREFIX + model_type,
            "__annotations__": annotations,
            "__module__": __name__,
            **fields,
        },
    )
    kind: Any = type(
        name,
        (DerivedLatentFlow, teacher_class),
        {"config_class": config, "teacher_class": teacher_class, "__module__": __name__},
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, kind, exist_ok=True)
    return kind


def per_layer_lists(config: Any) -> dict[str, list[Any]]:
    """What a teacher's config says of each of its layers, by field."""
    count = config.num_hidden_layers
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == count and "token" not in name
    }
