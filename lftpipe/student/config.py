"""The config of a student: its teacher's config, and which blocks a flow layer replaces."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, no_type_check

from transformers import GPTNeoXConfig, LlamaConfig

from lftpipe.base.errors import SettingsError
from lftpipe.config.layers import check_apart
from lftpipe.flow.solver import EVALUATIONS

Kind = Literal["flow", "layer", "layers", "linear", "skip"]
KINDS = ("flow", "layer", "layers", "linear", "skip")


@dataclass(frozen=True)
class Block:
    """Layers `start .. stop-1` of the teacher, and what stands in their place."""

    start: int
    stop: int
    kind: Kind = "flow"
    """`flow` is run in steps; `layer` (the regression baseline) and `linear` once; `layers` are `depth` of
    them, run `loops` times in a row; of `skip` nothing is left."""
    shift: bool = False
    """Whether the flow's modulation predicts shifts."""
    source: bool = False
    """Whether the flow sees the block's input too."""
    step: bool = False
    """Whether the flow knows the size of its steps."""
    depth: int = 1
    loops: int = 1

    def to_json(self) -> dict[str, Any]:
        """As a config has it."""
        return asdict(self)


class FlowLayout:
    """Where a student's layers come from, and how many places its KV cache has.

    Mixed into a family's config, which declares the fields.
    """

    teacher_layers: int
    blocks: list[dict[str, Any]] | None
    solver: str
    steps: int
    num_hidden_layers: int

    def lay_out(self) -> None:
        """Check the fields, and set `num_hidden_layers` to the places that the KV cache needs.

        Every evaluation of a flow layer attends over the states of its own time, so each has keys
        and values of its own: a place in the cache, like a layer that is run once.

        Raises
        ------
        SettingsError
            If blocks overlap or reach past the teacher's layers, or steps or solver make no sense.
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
        evaluations = sum(self.evaluations(place) for place in places)
        # Some of transformers' models run no more layers than this, and a linear map is one without a place.
        self.num_hidden_layers = max(evaluations, len(places))
        if evaluations == 0:
            raise SettingsError(
                "a student without attention", "a layer besides the linear map", "choose a smaller block"
            )

    @property
    def flow_blocks(self) -> list[Block]:
        """The blocks that are replaced, in order."""
        return [Block(**block) for block in self.blocks or []]

    def places(self) -> list[int | Block]:
        """What each of the student's layers is: a teacher's layer, by its index there, or a block."""
        starts = {block.start: block for block in self.flow_blocks}
        places: list[int | Block] = []
        index = 0
        while index < self.teacher_layers:
            block = starts.get(index)
            if block is None or block.kind != "skip":
                places.append(index if block is None else block)
            index = index + 1 if block is None else block.stop
        return places

    def evaluations(self, place: int | Block) -> int:
        """How often attention runs in that place, for one forward pass.

        Parameters
        ----------
        place
            A layer of the teacher, or a block that is replaced.
        """
        if isinstance(place, int) or place.kind == "layer":
            return 1
        if place.kind == "layers":
            return place.depth * place.loops
        return 0 if place.kind == "linear" else EVALUATIONS[self.solver] * self.steps


# transformers makes these dataclasses whose `__init__` takes any keyword, which checkers at run time
# that read its signature (jaxtyping's hook in tests) do not see.
@no_type_check
class LatentFlowGPTNeoXConfig(FlowLayout, GPTNeoXConfig):
    """A GPT-NeoX teacher's config with blocks replaced."""

    model_type = "latent_flow_gpt_neox"
    teacher_layers: int = 44
    blocks: list | None = None
    solver: str = "midpoint"
    steps: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        self.lay_out()
        super().__post_init__(**kwargs)


@no_type_check
class LatentFlowLlamaConfig(FlowLayout, LlamaConfig):
    """A Llama teacher's config with blocks replaced."""

    model_type = "latent_flow_llama"
    teacher_layers: int = 32
    blocks: list | None = None
    solver: str = "midpoint"
    steps: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        self.lay_out()
        super().__post_init__(**kwargs)
