"""Every stage's settings: frozen, documented, and checked when they are made. No torch, no numpy.

`lftpipe.config.recipe` reads them from TOML; `lftpipe.cli.options` makes options of their fields.
"""

from lftpipe.config.settings.base import (
    Common,
    Compression,
    ComputeDtype,
    Condition,
    Dtype,
    Form,
    Init,
    LossScale,
    Metric,
    MuonDtype,
    Objective,
    OptimizerName,
    Predictor,
    Role,
    SolverName,
    WalkTimes,
    WeightsDtype,
    recorded,
    to_json,
)
from lftpipe.config.settings.evaluate import (
    CompareSettings,
    EvaluateSettings,
    InfoSettings,
    RecoupleSettings,
    ReportSettings,
    RunsSettings,
    SweepSettings,
    ToySettings,
    VerifySettings,
)
from lftpipe.config.settings.extract import ExtractSettings
from lftpipe.config.settings.fusion import FuseSettings, RecogniseSettings
from lftpipe.config.settings.plan import Budgeted, CompressSettings, PlanSettings
from lftpipe.config.settings.student import ExportSettings, GenerateSettings, PullSettings, PushSettings
from lftpipe.config.settings.train import HealSettings, TrainSettings, depth_of, loss_text, width_of

__all__ = [
    "Budgeted",
    "Common",
    "CompareSettings",
    "CompressSettings",
    "Compression",
    "ComputeDtype",
    "Condition",
    "Dtype",
    "EvaluateSettings",
    "ExportSettings",
    "ExtractSettings",
    "Form",
    "FuseSettings",
    "GenerateSettings",
    "HealSettings",
    "InfoSettings",
    "Init",
    "LossScale",
    "Metric",
    "MuonDtype",
    "Objective",
    "OptimizerName",
    "PlanSettings",
    "Predictor",
    "PullSettings",
    "PushSettings",
    "RecogniseSettings",
    "RecoupleSettings",
    "ReportSettings",
    "Role",
    "RunsSettings",
    "SolverName",
    "SweepSettings",
    "ToySettings",
    "TrainSettings",
    "VerifySettings",
    "WalkTimes",
    "WeightsDtype",
    "depth_of",
    "loss_text",
    "recorded",
    "to_json",
    "width_of",
]
