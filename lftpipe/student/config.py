"""The config of a student: its teacher's config, and which blocks a flow layer replaces."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lftpipe.base.errors import SettingsError
from lftpipe.base.shape import KINDS, Part
from lftpipe.config.layers import check_apart
from lftpipe.flow.solver import EVALUATIONS

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


class FlowLayout:
    """Where a student's layers come from, and how many places its KV cache has.

    Mixed into a family's config, which declares the fields. What a teacher's config says of each layer, such
    as its kind of attention, is said of each place, then of each further evaluation of a flow.
    """

    teacher_layers: int
    blocks: list[dict[str, Any]] | None
    solver: str
    steps: int
    teacher_lists: dict[str, list[Any]] | None
    num_hidden_layers: int

    def lay_out(self) -> None:
        """Check the fields, and set `num_hidden_layers` to the places that the KV cache needs.

        Every evaluation of a flow layer attends over the states of its own time, so each has keys
        and values of its own: a place in the cache, like a layer that is run once.

        Raises `SettingsError` if blocks overlap or reach past the teacher's layers, or steps or solver make
        no sense.
        """
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise SettingsError(f"k = {self.steps} steps", "at least 1", "choose a positive number of steps")
        if self.solver not in EVALUATIONS:
            raise SettingsError(
                f"solver {self.solver!r}", f"one of {', '.join(EVALUATIONS)}", "choose one of them"
            )
        for block in self.flow_blocks:
            if block.kind not in KINDS:
                raise SettingsError(
                    f"block of kind {block.kind!r}", f"one of {', '.join(KINDS)}", "correct config.json"
                )
        blocks = [(block.start, block.stop) for block in self.flow_blocks]
        check_apart(blocks, "a student with blocks", self.teacher_layers)
        places = self.places()
        if all(isinstance(place, Part) and place.kind == "linear" for place in places):
            raise SettingsError(
                "a student without attention", "a layer besides the linear map", "choose a smaller block"
            )
        origins = [place if isinstance(place, int) else place.start for place in places]
        counts = [self.evaluations(place) for place in places]
        more = [origin for origin, count in zip(origins, counts, strict=True) for _ in range(count - 1)]
        self.num_hidden_layers = len(origins) + len(more)
        for name, values in (self.teacher_lists or {}).items():
            setattr(self, name, [values[origin] for origin in origins + more])

    def __post_init__(self, **kwargs: Any) -> None:
        if self.teacher_lists is None:
            self.teacher_lists = {
                name: value
                for name, value in vars(self).items()
                if isinstance(value, list)
                and len(value) == self.teacher_layers
                and "token" not in name
                and name not in (*FIELDS, "architectures")
            }
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

    @property
    def flow_blocks(self) -> list[Part]:
        """The blocks that are replaced, in order."""
        return [Part(**block) for block in self.blocks or []]

    def places(self) -> list[int | Part]:
        """What each of the student's layers is: a teacher's layer, by its index there, or a block."""
        starts = {block.start: block for block in self.flow_blocks}
        places: list[int | Part] = []
        index = 0
        while index < self.teacher_layers:
            block = starts.get(index)
            if block is None or block.kind != "skip":
                places.append(index if block is None else block)
            index = index + 1 if block is None else block.stop
        return places

    def evaluations(self, place: int | Part) -> int:
        """How often a layer runs in that place, for one forward pass; each time has a place in the cache.

        `place`: a layer of the teacher, or a block that is replaced.
        """
        if isinstance(place, int) or place.kind in ("layer", "linear"):
            return 1
        if place.kind == "layers":
            return place.depth * place.loops
        return EVALUATIONS[self.solver] * self.steps
