"""Every stage's settings: frozen and documented. `lftpipe.config.recipe` reads and checks them.

No torch here: `lftpipe --help` and a usage error cost nothing.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["float16", "float32", "int8"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Metric = Literal["euclidean", "sqeuclidean", "cosine"]
Objective = Literal["fw", "sfm", "hybrid", "regression", "trajectory", "linear"]
SolverName = Literal["midpoint", "euler"]
Predictor = Literal["ratio", "gap", "displacement", "probe"]
LossScale = Literal["token", "channel", "norm", "none"]
OptimizerName = Literal["muon", "adamw"]
WalkTimes = Literal["uniform", "equal", "mixed"]
Init = Literal["layer", "readout"]
Condition = Literal["none", "source", "step"]
Form = Literal["latent-flow", "plain"]
WeightsDtype = Literal["float32", "bfloat16", "float16"]

DEFAULT_WORKSPACE = "data"


def default_workspace() -> Path:
    """`LFTPIPE_WORKSPACE`, or `data` in the current folder."""
    return Path(os.environ.get("LFTPIPE_WORKSPACE", DEFAULT_WORKSPACE))


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage takes."""

    workspace: Path = dataclasses.field(default_factory=default_workspace)
    """Folder under which every experiment lives."""
    store: Path | None = None
    """The store; left out, the only one in the workspace."""
    seed: int = 0
    threads: int | None = None
    """Processor threads; left out, torch's choice."""
    device: str = "cpu"
    force: bool = False
    """Overwrite what is there."""


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Common):
    """`lftpipe extract`: run the teacher once and store its states."""

    model: str = "pythia-tiny"
    """Registered name, Hub id, local folder, or `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    corpus: str | None = None
    """Registered name, file, folder, or `hf:<dataset>[:<config>[:<split>]]`; default: the teacher's."""
    layers: str = "all"
    """States to store: `all`, a list `6,18`, or a half-open range `0:13`."""
    context: int = 512
    """Tokens in a sequence."""
    tokens: int = 200_000
    """Training tokens, rounded up to whole sequences."""
    validation_tokens: int = 20_000
    attention: bool = True
    """Store each layer's attention-branch output too."""
    logits: int = 0
    """Store so many of the teacher's largest next-token logits of every position too, e.g. 64."""
    dtype: Dtype = "float16"
    """Format on disk."""
    compute_dtype: ComputeDtype = "auto"
    """`auto`: bfloat16 matrix products where the processor has them, the residual in float32."""
    batch_tokens: int = 2048
    """Tokens in one forward pass of the teacher."""
    dry_run: bool = False
    """Print sizes and the time a short probe promises; write nothing."""
    resume: bool = True
    """Go on with an interrupted or smaller store."""
    repair: bool = False
    """Compute again what `lftpipe verify` finds damaged."""


@dataclass(frozen=True, kw_only=True)
class RecoupleSettings(Common):
    """`lftpipe recouple`: the recoupling-ratio map over all pairs of stored states."""

    tokens: int = 256
    """Samples O in one optimal-transport problem."""
    batches: int = 8
    """Problems for each pair of states; mean and standard error are over them."""
    sequences: int = 16
    """Sequences that each batch draws its tokens from: what is read grows with it."""
    metric: Metric = "euclidean"
    layers: str = "all"
    """States to compare: `all` that are stored, a list `6,18`, or a half-open range `0:13`."""
    standardise: bool = False
    """Give each channel of each state mean 0 and standard deviation 1 first."""
    skip_first: bool = False
    """Leave out the first position of every document's piece in a sequence."""
    approximate: bool = False
    """Sinkhorn instead of exact transport, for more than 4096 tokens; uses `device`."""
    rank_by: Predictor = "ratio"
    """What blocks are ranked by; `probe` fits a linear map to every pair first."""
    show: str = ""
    """Pairs whose transport is drawn, as in `0:6,6:18`; default: the first and the best quarter."""
    out: Path | None = None
    """The JSON file; default `recoupling.json` beside the store."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Common):
    """`lftpipe train`: learn a flow layer for a block, or several at once."""

    block: str = dataclasses.field(default="auto", metadata={"repeated": True})
    """`m:n`, half-open, or `auto`: the best block of `replace` of the layers by the map; several give a flow
    layer each."""
    joint: bool = False
    """Train several blocks' flow layers as one student: each begins where the one before it ends."""
    replace: float = 0.25
    """Share of the layers that `--block auto` replaces."""
    rank_by: Predictor = "ratio"
    """By what `--block auto` chooses: a figure of the map."""
    objective: Objective = "fw"
    init: Init = "layer"
    """Where to start: the block's first layer as it is, or with its `readout`, the output maps of its
    attention and MLP, fitted in closed form to the whole block."""
    walk_steps: int = 3
    """Steps k of flow walking."""
    solver: SolverName = "midpoint"
    alpha: float = 0.001
    """Weight of SFM in the hybrid objective (eq. 9)."""
    loss: str | None = None
    """Weighted terms in stages, as in `fw@0.7/fw:0.1,logits` (docs/training.md); default: the objective's."""
    condition: Condition = "none"
    """What the velocity sees beside `x_t` and `t`: nothing, the `source` `x_0`, or the size of the `step`."""
    walk_times: WalkTimes = "uniform"
    """Times of a walk: drawn anew for each (algorithm 2), in `equal` steps as at inference, or `mixed`: in
    equal steps whose number is drawn for each batch, from 1 to k."""
    loss_scale: LossScale = "token"
    """What a squared error is measured against: see `lftpipe.flow.objective`."""
    tokens: int = 1_000_000
    """Training tokens to see; the store is read again in a new order as often as needed."""
    batch_tokens: int = 1024
    """In one step; at small budgets many small steps reach more than few large ones."""
    optimizer: OptimizerName = "muon"
    """Of the layer's matrices; the rest is always AdamW's."""
    learning_rate: float | None = None
    """At its peak; left out, 0.02 for `muon` and 0.003 for `adamw`."""
    warmup: float = 0.05
    """Share of the steps with a rising learning rate; cosine decay follows."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm; 0: any."""
    ema: float = 0.0
    """Decay of an average of the weights, which is what is kept: 0.999, say; 0 keeps the last weights."""
    hold_back: float = 0.0
    """Share of the training sequences kept from training, on which the best weights are chosen."""
    evaluate_every: int = 0
    """Steps between evaluations on what is held back and, only to be logged, on validation; 0: 100 if
    anything is held back, else none."""
    patience: int = 0
    """Evaluations without a better loss on what is held back after which training stops; 0: it never does."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too, into the run's folder."""
    compute_dtype: ComputeDtype = "auto"
    from_teacher: bool = False
    """Run the teacher for every batch instead of reading the store: the cache's yardstick."""
    run: str | None = dataclasses.field(default=None, metadata={"repeated": True})
    """Name or path of the run; default: block, objective and seed. Of a recipe's variants, those to train."""
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, metadata={"recipe": True})
    """A recipe's `[train.variants.NAME]`: runs NAME-m-n-seedS that differ in these, from the same batches."""
    resume: bool = False
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""


def loss_text(settings: TrainSettings) -> str:
    """The `--loss` of a run: its own, or its objective's."""
    if settings.loss is not None:
        return settings.loss
    return f"fw,sfm:{settings.alpha:g}" if settings.objective == "hybrid" else settings.objective


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Common):
    """`lftpipe evaluate`: Table 1's rows over the whole validation split."""

    runs: tuple[str, ...] = dataclasses.field(default=(), metadata={"argument": True})
    """Names or paths of runs; none: every finished run beside the store."""
    k: tuple[int, ...] = (1, 2, 3, 8)
    """Step counts at inference."""
    solver: SolverName | None = None
    """Solver of every flow; left out, each run's own."""
    adaptive: tuple[float, ...] = ()
    """Thresholds such as 0.02,0.05, an experiment: each token takes as many of Euler's steps as it needs
    to settle, at most the largest of `k`; a table of its own."""
    together: bool = False
    """Score the student of all the runs named, of blocks that do not overlap, too."""
    skips: tuple[int, ...] = (1, 2, 3)
    """Numbers of layers, from the block's first, that the skip rows leave out."""
    batch_tokens: int = 2048
    compute_dtype: ComputeDtype = "float32"
    out: Path | None = None
    """The JSON file; default `results.json` beside the store. A `.md` file goes beside it."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Common):
    """`lftpipe sweep`: a short run for every block of some lengths: does the map predict what they reach?"""

    lengths: tuple[int, ...] = ()
    """Numbers of layers; left out, a quarter and a half of the teacher's."""
    objective: Objective = "regression"
    """What every run learns; `regression` is the cheapest."""
    tokens: int = 300_000
    """Training tokens of each run."""
    batch_tokens: int = 1024
    optimizer: OptimizerName = "muon"
    """Of every run."""
    learning_rate: float | None = None
    """Of every run; left out, the optimiser's own."""
    compute_dtype: ComputeDtype = "auto"
    """Of training; scores are computed in float32."""
    repeats: int = 1
    """Runs of each block, with seeds from `seed` on; their mean counts."""
    probe_tokens: int = 16_384
    """Training tokens that the linear probe is fitted on."""
    out: Path | None = None
    """The JSON file; default `sweep.json` beside the store. The runs are in a folder of its name."""


@dataclass(frozen=True, kw_only=True)
class ToySettings(Common):
    """`lftpipe toy`: draw figure 3, paired points of the plane under every objective."""

    steps: int = 2000
    """Training steps of each panel."""
    batch: int = 512
    """Pairs in a step."""
    learning_rate: float = 3e-3
    solver: SolverName = "midpoint"
    steps_at_inference: int = 48
    """Steps of standard flow matching; walks take those they were trained with."""
    out: Path | None = None
    """The JSON file; default `toy.json` in the workspace. The picture goes beside it."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Common):
    """`lftpipe export`: write a student as a folder that transformers loads."""

    runs: tuple[str, ...] = dataclasses.field(default=(), metadata={"argument": True})
    """Name or path of a run; several, of blocks that do not overlap, make one student."""
    k: int | None = None
    """Steps; left out, those of training."""
    solver: SolverName | None = None
    """Solver; left out, that of training."""
    form: Form = "latent-flow"
    """`latent-flow`: any student, loaded where lftpipe is installed. `plain`: an ordinary checkpoint of the
    teacher's family, where steps of Euler's unroll into layers exactly."""
    dtype: WeightsDtype = "float32"
    """Format of the weights."""
    out: Path | None = None
    """The folder; default: `export-<form>-k<k>` in the first run's folder."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Common):
    """`lftpipe generate`: continue a prompt with a student, and say how fast."""

    target: str | None = dataclasses.field(default=None, metadata={"argument": True})
    """Name or path of a run, or a folder in transformers' format; none with --draft."""
    prompt: str | None = None
    """The text to continue."""
    max_new_tokens: int = 64
    k: int | None = None
    """Steps; left out, those of training or export."""
    solver: SolverName | None = None
    """Solver; left out, that of training or export."""
    temperature: float = 0.0
    """0 takes the likeliest token every time; above, tokens are drawn."""
    compare: bool = False
    """Let the run's teacher continue the prompt too."""
    draft: str | None = None
    """A run whose teacher writes the text, greedily, with the run's student as its draft."""


@dataclass(frozen=True, kw_only=True)
class InfoSettings(Common):
    """`lftpipe info`: what a store or a run holds, and from what it was made."""

    target: Path | None = dataclasses.field(default=None, metadata={"argument": True})
    """A store, or a run by name or folder; left out, the workspace's only store."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Common):
    """`lftpipe verify`: check every byte of a store against its manifest."""

    target: Path | None = dataclasses.field(default=None, metadata={"argument": True})
    """The store; left out, the workspace's only one."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Common):
    """`lftpipe report`: one page of everything that was found beside a store."""

    out: Path | None = None
    """The Markdown file; default `report.md` beside the store."""


def to_plain(settings: Common) -> dict[str, Any]:
    """Settings as JSON- and TOML-ready values."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, tuple):
            value = list(value)
        if value not in (None, {}):
            plain[field.name] = value
    return plain
