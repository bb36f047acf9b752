"""The student as a transformers model: the teacher with a flow layer in place of each block.

The classes are the teacher's own, with other contents in their list of layers. So everything that
transformers does for the teacher's family (generation, beams, padding, checkpointing, moves of
device and dtype) it does for the student, by the same code.
"""

import copy
from typing import Any, ClassVar

from torch import nn

from lftpipe.base.errors import RunError, TeacherError
from lftpipe.families.family import Family
from lftpipe.families.structure import Structure, structure_of
from lftpipe.student.config import PREFIX
from lftpipe.student.flow_layer import FlowLayer, number_layer


class LatentFlow:
    """What makes a family's model a student; mixed in before the family's own language model."""

    teacher_class: ClassVar[Any]
    config: Any
    training: bool
    # What was not tried is not promised.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _no_split_modules: set[str] | list[str] | None = ["FlowLayer"]  # noqa: RUF012 (read by transformers)

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        teacher_config = config.teacher_config()
        structure = structure_of(teacher_config)
        refuse_without_flow(structure, config.model_type.removeprefix(PREFIX))
        self.family: Family = structure.family()
        built = self.teacher_class(copy.deepcopy(teacher_config)).get_submodule(structure.path)
        layers = [
            built[place]
            if isinstance(place, int)
            else FlowLayer(self.family, teacher_config, place, built[place.start], structure.arity)
            for place in config.places()
        ]
        self.set_submodule(structure.path, nn.ModuleList(layers))  # pyright: ignore[reportAttributeAccessIssue]
        self.caches = structure.caches
        if not self.caches:
            config.use_cache = False
        self._number_slots()
        self.post_init()  # pyright: ignore[reportAttributeAccessIssue]

    def set_attn_implementation(self, *given: Any, **options: Any) -> None:
        """As transformers has it; layers have the teacher's config, so that they are told too.

        `*given`, `**options`: as `transformers.PreTrainedModel.set_attn_implementation` takes them.
        """
        super().set_attn_implementation(*given, **options)  # pyright: ignore[reportAttributeAccessIssue]
        for part in self.modules():  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(part, "config"):
                part.config._attn_implementation = self.config._attn_implementation

    def generate(self, *given: Any, **options: Any) -> Any:
        """As transformers has it; without a cache where layers keep more than keys and values.

        `*given`, `**options`: as `transformers.GenerationMixin.generate` takes them.
        """
        if not self.caches:
            options["use_cache"] = False
        return super().generate(*given, **options)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def student_layers(self) -> nn.ModuleList:
        """Kept layers and flow layers, in order."""
        return self.get_submodule(self.family.layers_prefix)  # pyright: ignore

    def set_steps(self, steps: int, solver: str | None = None) -> None:
        """Run every flow in `steps` steps from now on, by the same solver or another.

        A KV cache made before does not fit any more.

        `solver`: `euler` or `midpoint`; left out, the present one.
        Raises `SettingsError` if `steps` is below 1 or the solver unknown; the student stays as it was.
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


def refuse_without_flow(structure: Structure, name: str) -> None:
    """Refuse students of families that have no flow layers.

    `name`: of the teacher, for the error.
    """
    if structure.without_flow:
        raise TeacherError(
            f"a student of a {name} model", f"flow layers, but {structure.without_flow}", "choose another"
        )
