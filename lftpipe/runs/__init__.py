"""Runs: the folder that a trained flow layer lies in, its manifest, its module."""

from lftpipe.artefacts.samples import SAMPLES
from lftpipe.runs.finished import Run, open_run, save_run
from lftpipe.runs.flow import build_flow, healed_teacher, is_stack, load_flow
from lftpipe.runs.folder import (
    CHECKPOINT,
    DIVERGED,
    MANIFEST,
    METRICS,
    SETTINGS,
    WEIGHTS,
    drop_metrics_after,
    note_divergence,
    read_settings,
    write_settings,
)
from lftpipe.runs.joint import open_student, open_students, refuse_parts

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
    "is_stack",
    "load_flow",
    "note_divergence",
    "open_run",
    "open_student",
    "open_students",
    "read_settings",
    "refuse_parts",
    "save_run",
    "write_settings",
]
