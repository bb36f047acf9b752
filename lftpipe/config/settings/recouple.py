"""Settings of `lftpipe recouple`."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Batch,
    Count,
    File,
    Metric,
    OfStore,
    OnDevice,
    Predictor,
    Seeded,
    Text,
    Writing,
)


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
