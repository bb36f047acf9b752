"""What the settings of all stages share: kinds of values with their bounds, and the fields of many stages.

Each settings class is a frozen pydantic dataclass. Its fields are the options of a command: the annotation
bounds the value, and the docstring below a field is its help. `PANELS` groups the options in `--help`; a
field that no panel names is shown last, among the expert options.
"""

import dataclasses
import enum
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as validator_of_all
from pydantic.dataclasses import dataclass

from lftpipe.config.refusal import as_tuple_of_numbers, check_path, check_temperature, check_text, refusal

CONFIG = ConfigDict(
    strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
)


class Role(enum.Enum):
    """How a field is given, if not as one option."""

    ARGUMENT = enum.auto()
    """By position."""
    REPEATED = enum.auto()
    """As an option that may be given several times; the texts are joined with commas."""
    RECIPE = enum.auto()
    """In a recipe only."""


# Paths and lists accept what Python callers and TOML write for them: a text, a list.
Text = Annotated[str, AfterValidator(check_text)]
File = Annotated[Path, Field(strict=False), AfterValidator(check_path)]
Names = Annotated[tuple[Text, ...], Field(strict=False), Role.ARGUMENT]
Device = Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:\d{1,4})?)$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, le=10**15)]
CountOrZero = Annotated[int, Field(ge=0, le=10**15)]
Batch = Annotated[int, Field(ge=1, le=2**24)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Counts = Annotated[tuple[Steps, ...], Field(strict=False)]
Depth = Annotated[int, Field(ge=0, le=1000)]
Depths = Annotated[tuple[Depth, ...], Field(strict=False, min_length=1)]
Width = Annotated[float, Field(gt=0, le=1)]
Widths = Annotated[tuple[Width, ...], Field(strict=False, min_length=1), BeforeValidator(as_tuple_of_numbers)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(check_temperature)]

Dtype = Literal["float16", "float32", "int8"]
Compression = Literal["none", "blosc"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Metric = Literal["euclidean", "sqeuclidean", "cosine"]
Objective = Literal[
    "fw",
    "sfm",
    "hybrid",
    "regression",
    "trajectory",
    "linear",
    "distil",
    "looped",
    "skip",
    "replaceme",
    "linearpatch",
]
SolverName = Literal["midpoint", "euler"]
Predictor = Literal["ratio", "gap", "displacement", "probe", "influence"]
LossScale = Literal["token", "channel", "norm", "none"]
OptimizerName = Literal["muon", "adamw"]
MuonDtype = Literal["bfloat16", "float32", "auto"]
WalkTimes = Literal["uniform", "equal", "mixed"]
Init = Literal["layer", "readout", "mean"]
Condition = Literal["none", "source", "step"]
Form = Literal["latent-flow", "plain"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
WeightsDtype = Literal["float32", "bfloat16", "float16"]

DEFAULT_WORKSPACE = "data"

#: The panel of what one always needs; the help option is in it too.
MAIN = "Options"


def default_workspace() -> Path:
    """`LFTPIPE_WORKSPACE`, or `data` in the current folder."""
    return Path(os.environ.get("LFTPIPE_WORKSPACE", DEFAULT_WORKSPACE))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Common:
    """What every stage takes."""

    workspace: File = Field(default_factory=default_workspace)
    """The folder of all experiments; LFTPIPE_WORKSPACE sets another default."""

    PANELS: ClassVar[dict[str, str]] = {}
    """Title of a group of options: names of its fields, in their order."""

    @validator_of_all(mode="wrap")
    @classmethod
    def _refuse_in_one_line(cls, given: Any, validate: Callable[[Any], Any]) -> Any:
        """Turn pydantic's report into a `SettingsError`, which is raised from it."""
        try:
            return validate(given)
        except ValidationError as error:
            raise refusal(error, names=[field.name for field in dataclasses.fields(cls)]) from error


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OfStore(Common):
    """A stage that reads or writes a store."""

    store: File | None = None
    """The store; default: the only one in the workspace."""
    cache: File | None = None
    """Folder that keeps what is read from a store at a URL; default: nothing is kept."""
    cache_bytes: Annotated[int, Field(ge=0, le=2**60)] = 16 * 2**30
    """Bytes that --cache keeps at most; the longest unused are dropped first."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Computing(Common):
    """A stage that computes."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processor threads; default: torch's choice."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OnDevice(Computing):
    """A stage that computes on a device of choice."""

    device: Device = "cpu"
    """`cpu`, `cuda`, `cuda:1` or `mps`."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Spread(OnDevice):
    """A stage that trains several runs."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that train several runs at the same time: each has a GPU with `--device cuda`, else its part
    of the threads."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Seeded(Common):
    """A stage that draws random numbers."""

    seed: Seed = 0
    """Seed of all random numbers."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Writing(Common):
    """A stage that writes files."""

    force: bool = False
    """Overwrite what an earlier run of the command left."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InSteps(Seeded, Writing):
    """A stage that trains in steps."""

    batch_tokens: Batch = 1024
    """Tokens in one step; a small budget is better spent on many small steps."""
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises; cosine decay follows."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    clip: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema: Fraction = 0.0
    """Keep an exponential average of the weights with this decay, such as 0.999; 0 keeps the last weights."""
    patience: CountOrZero = 0
    """Stop after this many evaluations without a better loss on the sequences held back; 0: never."""
    compute_dtype: ComputeDtype = "auto"
    """Number format of matrix products; `auto`: bfloat16 if the processor has it, else float32."""
    resume: bool = False
    """Continue an interrupted run."""
    track: TrackerName | None = None
    """Also send the metrics to a tracker: `tensorboard` writes into the run's folder."""
    log_every: Count = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints, which are written in the background; 0: by `--checkpoint-every` alone."""
    checkpoint_every: CountOrZero = 0
    """Steps between further checkpoints; 0: by the clock alone."""


def to_json(settings: Common) -> dict[str, Any]:
    """Settings as values that JSON and TOML can hold; what is None or an empty table is left out.

    Parameters
    ----------
    settings
        Of any stage.

    Returns
    -------
    dict
        By field name, in the order of the fields. `from_recipe` reads it back.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, tuple):
            value = list(value)
        if value not in (None, {}):
            values[field.name] = value
    return values


def recorded(settings: Common) -> dict[str, Any]:
    """Settings as a result records them: without `force` and `workers`, which say nothing of what was made.

    Parameters
    ----------
    settings
        Of any stage.
    """
    return {key: value for key, value in to_json(settings).items() if key not in ("force", "workers")}
