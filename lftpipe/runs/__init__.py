"""Runs: the folder that a trained flow layer lies in, its manifest, its module."""

from lftpipe.results.run import SAMPLES
from lftpipe.runs.flow import build_flow, healed_teacher, load_flow, sequence_of
from lftpipe.runs.run import (
    CHECKPOINT,
    DIVERGED,
    MANIFEST,
    METRICS,
    SETTINGS,
    WEIGHTS,
    Run,
    drop_metrics_after,
    note_divergence,
    open_run,
    open_runs,
    read_settings,
    refuse_healed,
    save_run,
    write_settings,
)

__all__ = [
    "CHECKPOINT",
    "DIVERGED",
    "MANIFEST",
    "METRICS",
    "SAMPLES",
    "SETTINGS",
    "WEIGHTS",
    "Run",
    "build_flow",
    "drop_metrics_after",
    "healed_teacher",
    "load_flow",
    "note_divergence",
    "open_run",
    "open_runs",
    "read_settings",
    "refuse_healed",
    "save_run",
    "sequence_of",
    "write_settings",
]
