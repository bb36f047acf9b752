"""A run's folder: settings, metrics, weights, checkpoint, manifest."""

import json
import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import tomli_w
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lftpipe.artefacts.run import RunManifest
from lftpipe.artefacts.samples import SAMPLES as SAMPLES
from lftpipe.config.recipe import RECORD_TABLE
from lftpipe.errors import RunError
from lftpipe.files import file_digest, seal, write_atomic
from lftpipe.flow.linear import LinearMap
from lftpipe.flow.solver import EVALUATIONS, Method
from lftpipe.flow.stack import LayerStack, NoLayer
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.checkpoint import Overlay
from lftpipe.teacher.parts import empty_layer, fill_buffers
from lftpipe.teacher.source import Teacher

MANIFEST, SETTINGS, METRICS, WEIGHTS, CHECKPOINT, DIVERGED = (
    "manifest.json",
    "settings.toml",
    "metrics.jsonl",
    "flow.safetensors",
    "checkpoint/state.pt",
    "diverged.json",
)


@dataclass(frozen=True, kw_only=True)
class Run(RunManifest):
    """A finished run: its manifest, and where it is."""

    path: Path

    @property
    def has_time(self) -> bool:
        """Whether the estimator is a flow, that can be run in any number of steps."""
        return bool(self.velocity["time"])

    @property
    def label(self) -> str:
        """What a table calls its method."""
        return self.objective + (", healed" if self.healed else "")

    @property
    def starts_at(self) -> int:
        """The first layer that is not the teacher's: the block's, or 0 where healing trained those before."""
        told = self.healed
        while told is not None:
            if told["train"] == "student":
                return 0
            told = told.get("before")
        return self.block[0]

    def evaluations(self, method: Method, k: int) -> int:
        """NFE: layers that are evaluated in place of the block.

        Parameters
        ----------
        method, k
            Solver and number of steps.
        """
        if self.velocity.get("skip"):
            return 0
        return self.velocity.get("depth", 1) * self.velocity.get("loops", 1) * EVALUATIONS[method] * k


def write_settings(run: Path, settings: dict[str, Any], store_fingerprint: str, table: str = "train") -> None:
    """The run's resolved settings as a recipe that makes it again, and the store they go with.

    Parameters
    ----------
    run
        The run's folder.
    settings
        JSON-plain.
    store_fingerprint
        Of the store that it is trained on.
    table
        The command that made it.
    """
    run.mkdir(parents=True, exist_ok=True)
    recipe = {table: settings, RECORD_TABLE: {"fingerprint": store_fingerprint}}
    write_atomic(run / SETTINGS, tomli_w.dumps(recipe).encode())


def read_settings(run: Path) -> tuple[dict[str, Any], str]:
    """What `write_settings` wrote.

    Parameters
    ----------
    run
        The run's folder.

    Raises
    ------
    RunError
        If it is not readable.
    """
    try:
        recipe = tomllib.loads((run / SETTINGS).read_text())
        return recipe["heal" if "heal" in recipe else "train"], recipe[RECORD_TABLE]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"damaged {run / SETTINGS}", "the run's settings", "start again with --force"
        ) from error


def note_divergence(run: Path, step: int, learning_rate: float) -> None:
    """Record where a run diverged: it may be resumed with other settings of its steps then.

    Parameters
    ----------
    run
        The run's folder.
    step
        Where it diverged.
    learning_rate
        What it diverged with.
    """
    note = {"step": step, "learning_rate": learning_rate}
    write_atomic(run / DIVERGED, (json.dumps(note) + "\n").encode())


def drop_metrics_after(run: Path, step: int) -> None:
    """Cut the lines of steps that will be done again, and one that a kill cut short.

    Parameters
    ----------
    run
        The run's folder.
    step
        The last step to keep.
    """
    metrics = run / METRICS
    if metrics.exists():
        lines = metrics.read_bytes().decode(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomic(metrics, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> int | float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf


def _load_weights(run: Run) -> dict[str, Tensor]:
    try:
        return load_file(run.path / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"damaged {run.path / WEIGHTS}", "safetensors", "train the run again") from error


def save_run(
    path: Path,
    flow: nn.Module | dict[str, Tensor],
    manifest: dict[str, Any],
    changed: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, then the sealed manifest that makes the run a finished one.

    Parameters
    ----------
    path
        The run's folder.
    flow
        Whose weights are written, or the weights.
    manifest
        What is said of the run, JSON-plain; the digests are added here.
    changed
        Tensors of the teacher that are others now, by their names in its checkpoint.
    """
    weights = flow.state_dict() if isinstance(flow, nn.Module) else flow
    weights = weights | {_OF_TEACHER + name: value for name, value in (changed or {}).items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomic(path / WEIGHTS, save(tensors))
    manifest = manifest | {"weights_digest": file_digest(path / WEIGHTS)}
    if (path / METRICS).exists():
        manifest |= {"metrics_digest": file_digest(path / METRICS)}
    RunManifest.from_plain(manifest)
    write_atomic(path / MANIFEST, (json.dumps(seal(manifest), indent=1) + "\n").encode())


def open_run(path: Path) -> Run:
    """Read a finished run's manifest, and check that its weights are the ones it was written with.

    Parameters
    ----------
    path
        The run's folder.

    Raises
    ------
    RunError
        If the folder is no finished run, or its manifest or weights were changed.
    """
    try:
        manifest = RunManifest.from_json(path / MANIFEST)
    except FileNotFoundError as error:
        if (path / SETTINGS).is_file():
            raise RunError(
                f"unfinished run {path}", "a finished one", "continue it with `lftpipe train --resume`"
            ) from error
        raise RunError(f"{path}", RunManifest.NAME, "train it again") from error
    run = Run(path=path, **{field.name: getattr(manifest, field.name) for field in fields(manifest)})
    if not (path / WEIGHTS).is_file() or file_digest(path / WEIGHTS) != run.weights_digest:
        raise RunError(
            f"{path / WEIGHTS}", "the weights that the manifest was written for", "train the run again"
        )
    return run


#: Before the names of a teacher's tensors that healing changed, in a run's weights.
_OF_TEACHER = "teacher."


def healed_teacher(run: Run, teacher: Teacher) -> Teacher:
    """The teacher with the tensors that healing changed; of a run that was not healed, the teacher as it is.

    Parameters
    ----------
    run
        A finished run.
    teacher
        That it was trained for.
    """
    if run.healed is None:
        return teacher
    changed = {
        name.removeprefix(_OF_TEACHER): value
        for name, value in _load_weights(run).items()
        if name.startswith(_OF_TEACHER)
    }
    return replace(teacher, checkpoint=Overlay(teacher.checkpoint, changed))


def build_flow(teacher: Teacher, velocity: dict[str, Any], index: int = 0) -> nn.Module:
    """The module that a manifest's `velocity` describes, without weights.

    Parameters
    ----------
    teacher
        Of the run.
    velocity
        What the manifest says of the module.
    index
        The teacher's layer that it was made from: the block's first.
    """
    if velocity.get("linear"):
        return LinearMap(teacher.width)
    if velocity.get("skip"):
        return NoLayer()
    with torch.device("meta"):
        if is_stack(velocity):
            layers = [empty_layer(teacher, index) for _ in range(velocity["depth"])]
            return LayerStack(layers, velocity["loops"])
        return Velocity(empty_layer(teacher, index), teacher.width, **velocity)


def is_stack(velocity: dict[str, Any]) -> bool:
    """Whether a manifest's `velocity` describes ordinary layers in place of a flow.

    Parameters
    ----------
    velocity
        What a manifest says of the module.
    """
    return "depth" in velocity


def load_flow(run: Run, teacher: Teacher) -> nn.Module:
    """The trained flow layer of a run.

    Parameters
    ----------
    run
        The run's folder.
    teacher
        The teacher.

    Raises
    ------
    RunError
        If the file is damaged, or a tensor is missing, extra, or of another shape.
    """
    flow = build_flow(teacher, run.velocity, run.block[0])
    weights = _load_weights(run)
    tensors = {name: value for name, value in weights.items() if not name.startswith(_OF_TEACHER)}
    try:
        flow.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RunError(
            f"{run.path / WEIGHTS}: {reason}", "the flow layer's tensors", "train the run again"
        ) from error
    fill_buffers(teacher, flow)
    return flow.eval().requires_grad_(False)
