"""Settings of `train` and `heal`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from lftpipe.config.loss import LOSSES
from lftpipe.config.refusal import check_names
from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Condition,
    Count,
    CountOrZero,
    Depth,
    Depths,
    File,
    Fraction,
    Init,
    InSteps,
    LossScale,
    MuonDtype,
    NonNegative,
    Objective,
    OfStore,
    OnDevice,
    OptimizerName,
    Predictor,
    Role,
    SolverName,
    Spread,
    Steps,
    Text,
    WalkTimes,
    Widths,
)

# --- Settings of `lftpipe train`.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainSettings(OfStore, Spread, InSteps):
    """Of `lftpipe train`."""

    block: Annotated[Text, Role.REPEATED] = "auto"
    """The layers to replace: `m:n`, half-open; `each` layer by one of its own; or `auto`: the best block by
    the map. Given several times, it trains one flow layer for each block."""
    joint: bool = False
    """Train the flow layers of several blocks as one student, in one run: each starts where the one before it
    ends. `--block each` implies it."""
    replace: Fraction = 0.25
    """Fraction of the layers that `--block auto` replaces."""
    rank_by: Predictor = "ratio"
    """The figure of the map by which `--block auto` chooses."""
    objective: Objective = "fw"
    """What the flow layer learns: `fw` flow walking, `sfm` standard flow matching, `hybrid` both,
    `regression` without time, `trajectory` along the teacher's states; `distil` is our recipe. Rivals:
    `skip`, `linear`, `replaceme`, `linearpatch`, `looped`."""
    init: Init = "layer"
    """The start: a copy of the block's first layer; `readout` also fits its output matrices to the whole
    block in closed form; `mean`: the mean of the block's layers."""
    plan: File | None = None
    """A plan whose shape is trained as one student, by `distil`; it sets blocks, depths and widths."""
    depth: Depths | Depth | None = None
    """Layers in place of a block, for an objective without time; each starts from a part of the block.
    `2,1`: so many for each of several blocks. Default: 1; for `distil` 2 where five layers or more are
    replaced."""
    width: Widths = (1.0,)
    """Channels of the MLP as a fraction of the teacher's, rounded up to a multiple of 64. `1,0.5`: one number
    for each of several blocks."""
    walk_steps: Steps = 3
    """Steps k of flow walking."""
    solver: SolverName = "midpoint"
    """Solver of the flow, in training and afterwards."""
    alpha: NonNegative = 0.001
    """Weight of standard flow matching in the hybrid objective (eq. 9)."""
    loss: Text | None = None
    """Weighted terms in stages, such as `fw@0.7/fw:0.1,logits` (docs/training.md); default: the
    objective's."""
    condition: Condition = "none"
    """What the velocity also sees beside `x_t` and `t`: the `source` `x_0`, or the size of the `step`."""
    walk_times: WalkTimes = "uniform"
    """Times of a walk: `uniform` draws them for each walk (algorithm 2); `equal` steps, as at inference;
    `mixed`: equal steps, 1 to k of them, drawn for each batch."""
    loss_scale: LossScale = "token"
    """What divides a squared error: each `token`'s or `channel`'s own scale, the same after the `norm` that
    reads the state, or with `none` the batch's mean square."""
    tokens: Count = 1_000_000
    """Training tokens; the store is read again in a new order as often as needed."""
    window: CountOrZero = 0
    """Shuffle so many sequences among themselves, one window after the other; 0: the whole store. A rolling
    store has its own windows."""
    optimizer: OptimizerName = "muon"
    """Optimizer of the layer's matrices; AdamW always trains the rest."""
    muon_dtype: MuonDtype = "auto"
    """Number format in which Muon orthogonalises; `auto`: bfloat16 where the device multiplies in it, else
    float32, which is twenty times as fast there."""
    learning_rate: NonNegative | None = None
    """Peak learning rate; default: 0.02 for `muon` (0.005 for `distil`), 0.003 for `adamw`, or less where a
    step of that size would be large for the teacher's weights."""
    hold_back: Fraction = 0.0
    """Fraction of the training sequences held back, on which the best weights are chosen. It turns evaluation
    on: `--evaluate-every` then defaults to 100."""
    evaluate_every: CountOrZero = 0
    """Steps between evaluations on the sequences held back; validation is logged with them. 0: never, or 100
    with `--hold-back`."""
    from_teacher: bool = False
    """Run the teacher for every batch, or read the store (the default)."""
    run: Annotated[Text | None, Role.REPEATED] = None
    """Name or path of the run; default: named after block, objective and seed. With a recipe's variants:
    those to train."""
    variants: Annotated[
        dict[str, dict[str, Any]], Field(max_length=10_000), AfterValidator(check_names), Role.RECIPE
    ] = Field(default_factory=dict)
    """A recipe's `[train.variants.NAME]`: runs NAME-m-n-seedS that differ in these settings and see the same
    batches."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "block objective tokens run seed from_teacher device store workspace resume force",
        "The block": "plan replace rank_by joint init depth width workers",
        "The objective": "walk_steps solver loss alpha condition walk_times loss_scale",
        "The steps": "batch_tokens window optimizer muon_dtype learning_rate warmup weight_decay clip ema",
        "Watching the run": "hold_back evaluate_every patience log_every checkpoint_minutes checkpoint_every "
        "track",
    }


def depth_of(settings: TrainSettings, block: int = 0) -> int | None:
    """The layers in place of one of the blocks, as `--depth` says; None where it says nothing.

    Parameters
    ----------
    settings
        As given, or of one run.
    block
        Which of the blocks, counted from 0.
    """
    if isinstance(settings.depth, tuple):
        return settings.depth[block if len(settings.depth) > 1 else 0]
    return settings.depth


def width_of(settings: TrainSettings, block: int = 0) -> float:
    """The width of the layers in place of one of the blocks.

    Parameters
    ----------
    settings
        As given, or of one run.
    block
        Which of the blocks, counted from 0.
    """
    return settings.width[block if len(settings.width) > 1 else 0]


def loss_text(settings: TrainSettings) -> str:
    """The `--loss` of a run: its own, or its objective's.

    Parameters
    ----------
    settings
        Of the run.
    """
    if settings.loss is not None:
        return settings.loss
    if settings.objective == "hybrid":
        return f"fw,sfm:{settings.alpha:g}"
    return LOSSES.get(settings.objective, settings.objective)


# --- Settings of `lftpipe heal`.

Trained = Literal["tail", "student"]
Adapter = Literal["lora", "full"]
HealLoss = Literal["top-logits", "sampled-logits", "logits", "tokens"]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class HealSettings(OfStore, OnDevice, InSteps):
    """Of `lftpipe heal`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """Name or path of the run to heal; default: the store's only one."""
    train: Trained = "tail"
    """What learns: `tail`, the flow layer and those after it, from cached states; `student`, all layers."""
    adapter: Adapter = "lora"
    """How: `lora` trains low-rank adapters of all linear maps, merged at the end; `full` all weights."""
    rank: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Rank of the adapters."""
    loss: HealLoss = "top-logits"
    """What is learned: the store's `top-logits` (`sampled-logits`: without the whole head), the `logits` of
    the teacher's own last layers, or the `tokens` alone."""
    tokens: Count = 200_000
    """Training tokens."""
    learning_rate: NonNegative | None = None
    """Peak learning rate; default: 1e-3 for `lora`, 1e-4 for `full`."""
    hold_back: Fraction = 0.02
    """Fraction of the training sequences held back, on which the best weights are chosen."""
    evaluate_every: Count = 50
    """Steps between evaluations on the sequences held back."""
    run: Text | None = None
    """Name or path of the new run; default: the healed run's name with `-healed`."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "train adapter rank loss tokens learning_rate run seed device store workspace resume force",
        "The steps": "batch_tokens warmup weight_decay clip ema hold_back evaluate_every patience track",
    }
