"""Settings of the commands that measure (`recouple`, `evaluate`, `sweep`, `toy`) and that show."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Batch,
    ComputeDtype,
    Computing,
    Count,
    CountOrZero,
    Counts,
    File,
    Metric,
    Names,
    NonNegative,
    Objective,
    OfStore,
    OnDevice,
    OptimizerName,
    Predictor,
    Role,
    Seeded,
    SolverName,
    Spread,
    Steps,
    Text,
    Writing,
)

# --- Settings of the stages that compare: `lftpipe evaluate`, `sweep` and `toy`.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EvaluateSettings(OfStore, OnDevice, Writing):
    """Of `lftpipe evaluate`."""

    runs: Names = ()
    """Names or paths of runs; default: every finished run beside the store."""
    k: Counts = (1, 2, 3, 8)
    """Numbers of steps at inference."""
    solver: SolverName | None = None
    """Solver of every flow; default: each run's own."""
    adaptive: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """Thresholds such as 0.02,0.05 (an experiment): each token takes Euler steps until it settles, at most
    the largest of `--k`. They get a table of their own."""
    together: bool = False
    """Also score one student of all the runs named; their blocks must not overlap."""
    skips: Counts = (1, 2, 3)
    """Numbers of layers, from the block's first, that the skip rows leave out."""
    corpus: Text | None = None
    """Score on this corpus in place of the store's: registered name, file, folder, or `hf:...`. The teacher
    runs once for it, and its states are kept beside the store. `wikitext-2`, or `wikitext-2=FILE` with its
    raw test split, is scored as a whole, in windows of 2,048 tokens or of the model's context."""
    text_field: Text | None = None
    """The column of its tables that holds the documents, as `extract` has it."""
    tasks: Text | None = None
    """Score teacher and students on these tasks of lm_eval too: names with commas between, or a folder of
    YAML files. What was scored is kept beside the store, so the same command goes on where it was."""
    limit: Count | None = None
    """Documents of each task; default: all."""
    run_code: bool = False
    """Let `--tasks humaneval` run the programs that the models write: each in a process of its own, without
    network where the system allows that, for at most 10 seconds and in at most 1 GiB."""
    continuations: CountOrZero = 0
    """Let teacher and students continue so many held-out passages greedily, 64 tokens each: how long they
    agree, and how much they repeat."""
    batch_tokens: Batch = 2048
    """Tokens in one batch of validation."""
    compute_dtype: ComputeDtype = "float32"
    """Number format of matrix products."""
    out: File | None = None
    """The JSON file; default: `results.json` (or `results-CORPUS.json`) beside the store. The Markdown
    table goes beside it."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "k skips device store workspace out force",
        "What to score": "corpus text_field tasks limit run_code continuations solver together adaptive",
    }


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SweepSettings(OfStore, Spread, Seeded, Writing):
    """Of `lftpipe sweep`."""

    lengths: Counts = ()
    """Numbers of layers; default: a quarter and a half of the teacher's."""
    objective: Objective = "regression"
    """What every run learns; `regression` is the cheapest."""
    tokens: Count = 300_000
    """Training tokens of each run."""
    batch_tokens: Batch = 1024
    """Tokens in one step."""
    optimizer: OptimizerName = "muon"
    """Optimizer of every run."""
    learning_rate: NonNegative | None = None
    """Peak learning rate of every run; default: the optimizer's own."""
    compute_dtype: ComputeDtype = "auto"
    """Number format of training; scores are computed in float32."""
    repeats: Steps = 1
    """Runs of each block, with seeds from `--seed` on; their mean counts."""
    probe_tokens: Count = 16_384
    """Training tokens on which the linear probe is fitted."""
    out: File | None = None
    """The JSON file; default: `sweep.json` beside the store. The runs go into a folder of its name."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "lengths objective tokens seed device store workspace out force",
        "The runs": "batch_tokens optimizer learning_rate repeats probe_tokens workers",
    }


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ToySettings(Computing, Seeded, Writing):
    """Of `lftpipe toy`."""

    steps: Count = 2000
    """Training steps of each panel."""
    batch: Batch = 512
    """Pairs of points in a step."""
    learning_rate: NonNegative = 3e-3
    """Learning rate at the start; cosine decay follows."""
    solver: SolverName = "midpoint"
    """Solver of the flows."""
    steps_at_inference: Steps = 48
    """Steps of standard flow matching; a walk takes those it was trained with."""
    out: File | None = None
    """The JSON file; default: `toy.json` in the workspace. The picture goes beside it."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "steps seed workspace out force"}


# --- Settings of `lftpipe recouple`.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecoupleSettings(OfStore, OnDevice, Seeded, Writing):
    """Of `lftpipe recouple`."""

    tokens: Batch = 256
    """Tokens in one optimal-transport problem."""
    batches: Count = 8
    """Problems for each pair of states; the map shows their mean and standard error."""
    sequences: Count = 16
    """Sequences from which each problem draws its tokens; more sequences read more of the store."""
    metric: Metric = "euclidean"
    """Distance between two states."""
    layers: Text = "all"
    """States to compare: `all` that are stored, a list such as `6,18`, or a half-open range such as
    `0:13`."""
    standardise: bool = False
    """First scale each channel of each state to mean 0 and standard deviation 1."""
    skip_first: bool = False
    """Leave out the first position of every segment."""
    approximate: bool = False
    """Use Sinkhorn instead of exact transport; needed for more than 4096 tokens."""
    rank_by: Predictor = "ratio"
    """The figure that ranks blocks; `probe` fits a linear map to every pair first."""
    show: Text = ""
    """Pairs whose transport is drawn, such as `0:6,6:18`; default: the first pair and the best quarter."""
    out: File | None = None
    """The JSON file; default: `recoupling.json` beside the store."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "layers tokens batches seed store workspace out force",
        "The map": "metric rank_by sequences skip_first standardise approximate show",
    }


# --- Settings of `lftpipe info`, `verify`, `runs`, `compare` and `report`, which look at what is there.


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InfoSettings(OfStore):
    """Of `lftpipe info`."""

    target: Annotated[File | None, Role.ARGUMENT] = None
    """A store, or a run by name or folder; default: the workspace's only store."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class VerifySettings(OfStore):
    """Of `lftpipe verify`."""

    target: Annotated[File | None, Role.ARGUMENT] = None
    """The store; default: the workspace's only one."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ReportSettings(OfStore, Writing):
    """Of `lftpipe report`."""

    out: File | None = None
    """The Markdown file; default: `report.md` beside the store."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "out force store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RunsSettings(OfStore):
    """Of `lftpipe runs`."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CompareSettings(OfStore):
    """Of `lftpipe compare`."""

    runs: Names = ()
    """Two runs, by name or path."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}
