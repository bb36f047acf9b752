"""The folder of a run: its settings, manifest and files; finished runs, and the modules they hold."""

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import tomli_w
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lftpipe.base.errors import RunError, foreign
from lftpipe.base.files import file_digest, seal, write_atomic
from lftpipe.base.shape import Part
from lftpipe.base.workspace import command_of
from lftpipe.config.recipe import RECORD_TABLE
from lftpipe.flow.part import PartSequence, build_part
from lftpipe.flow.solver import EVALUATIONS, Method
from lftpipe.results.run import RunManifest
from lftpipe.teacher.checkpoint import Overlay
from lftpipe.teacher.layers import empty_layer, fill_buffers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import load_bridges

# --- The folder of a run: its settings, manifest and files; finished runs, and those that are one student.

# --- A run's folder: the names of its files, and those that a run in progress writes.

MANIFEST, SETTINGS, METRICS, WEIGHTS, CHECKPOINT, DIVERGED = (
    "manifest.json",
    "settings.toml",
    "metrics.jsonl",
    "flow.safetensors",
    "checkpoint/state.pt",
    "diverged.json",
)


def write_settings(
    run: Path,
    settings: dict[str, Any],
    store_fingerprint: str,
    table: str = "train",
    healed: str | None = None,
) -> None:
    """The run's resolved settings as a recipe that makes it again, and the store they go with.

    `healed`: digest of the weights that it healed, if it did.
    """
    run.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": store_fingerprint} | ({"healed": healed} if healed else {})
    recipe = {table: settings, RECORD_TABLE: record}
    write_atomic(run / SETTINGS, tomli_w.dumps(recipe).encode())


def read_settings(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What `write_settings` wrote: the settings, and what they go with, as `fingerprint` and `healed`."""
    with foreign(RunError, f"damaged {run / SETTINGS}", "the run's settings", "start again with --force"):
        recipe = tomllib.loads((run / SETTINGS).read_text())
        settings, record = recipe["heal" if "heal" in recipe else "train"], recipe[RECORD_TABLE]
        if not (isinstance(settings, dict) and isinstance(record["fingerprint"], str)):
            raise TypeError("no table of settings")
        return settings, record


def note_divergence(run: Path, step: int, learning_rate: float) -> None:
    """Record where a run diverged: it may be resumed with other settings of its steps then."""
    note = {"step": step, "learning_rate": learning_rate}
    write_atomic(run / DIVERGED, (json.dumps(note) + "\n").encode())


def drop_metrics_after(run: Path, step: int) -> None:
    """Cut the lines of steps that will be done again, and one that a kill cut short."""
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


# --- A finished run: its manifest, sealed, and the weights that it was written for.

#: Before the names of a teacher's tensors that healing changed, in a run's weights.
OF_TEACHER = "teacher."


@dataclass(frozen=True, kw_only=True)
class Run(RunManifest):
    """A finished run: its manifest, and where it is."""

    path: Path

    @property
    def has_time(self) -> bool:
        """Whether the estimator is a flow, that can be run in any number of steps."""
        return any(part.kind == "flow" for part in self.parts)

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

    @property
    def shortened(self) -> list[tuple[int, int]]:
        """The blocks in place of which there are fewer layers."""
        return [part.block for part in self.parts if part.stop - part.start > part.layers]

    def evaluations(self, method: Method, k: int) -> int:
        """NFE: layers that are evaluated in place of the block."""
        timed = EVALUATIONS[method] * k
        counts = {"flow": timed, "layer": 1, "linear": 1, "skip": 0}
        return sum(counts.get(part.kind, part.depth * part.loops) for part in self.parts)


def load_weights(run: Run) -> dict[str, Tensor]:
    """All tensors of a run's weights, those of the teacher that healing changed too."""
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
    """Write weights, then the sealed manifest that makes the run a finished one."""
    weights = flow.state_dict() if isinstance(flow, nn.Module) else flow
    weights = weights | {OF_TEACHER + name: value for name, value in (changed or {}).items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomic(path / WEIGHTS, save(tensors))
    manifest = manifest | {"weights_digest": file_digest(path / WEIGHTS)}
    if (path / METRICS).exists():
        manifest |= {"metrics_digest": file_digest(path / METRICS)}
    RunManifest.from_plain(manifest)
    write_atomic(path / MANIFEST, (json.dumps(seal(manifest), indent=1) + "\n").encode())


def open_run(path: Path) -> Run:
    """Read a finished run's manifest, and check that its weights are the ones it was written with.

    Raises `RunError` if the folder is no finished run, or its manifest or weights were changed.
    """
    try:
        manifest = RunManifest.from_json(path / MANIFEST)
    except FileNotFoundError as error:
        if (path / SETTINGS).is_file():
            how = f"continue it with `lftpipe {command_of(path)} --resume`"
            raise RunError(f"unfinished run {path}", "a finished one", how) from error
        raise RunError(f"{path}", RunManifest.NAME, "train it again") from error
    run = Run(path=path, **{field.name: getattr(manifest, field.name) for field in fields(manifest)})
    if not (path / WEIGHTS).is_file() or file_digest(path / WEIGHTS) != run.weights_digest:
        raise RunError(
            f"{path / WEIGHTS}", "the weights that the manifest was written for", "train the run again"
        )
    return run


# --- Runs whose flow layers are one student's: found by the name of any of them, and kept together.


def open_runs(paths: Iterable[Path]) -> list[Run]:
    """Several runs, each once, in the order in which they are named."""
    found: dict[Path, Run] = {}
    for path in paths:
        found.setdefault(path.resolve(), open_run(path))
    return list(found.values())


def refuse_healed(opened: Sequence[Run]) -> None:
    """Refuse to put a healed run into a student that it was not healed in."""
    if len(opened) > 1 and any(run.healed is not None for run in opened):
        raise RunError(
            "a healed run beside others", "a healed run alone: its layers fit no other", "name it alone"
        )


# --- The module that a run trained, and the teacher as healing changed it.


def healed_teacher(student: Sequence[Run], teacher: Teacher) -> Teacher:
    """The teacher with the tensors that healing changed; where nothing was healed, the teacher as it is."""
    changed = {
        name.removeprefix(OF_TEACHER): value
        for run in student
        if run.healed is not None
        for name, value in load_weights(run).items()
        if name.startswith(OF_TEACHER)
    }
    return replace(teacher, checkpoint=Overlay(teacher.checkpoint, changed)) if changed else teacher


def build_flow(teacher: Teacher, parts: Sequence[Part]) -> nn.Module:
    """The module that a shape describes, without weights."""
    with torch.device("meta"):
        modules = [
            build_part(part, teacher.width, lambda part=part: empty_layer(teacher, part.start))
            for part in parts
        ]
    return sequence_of(teacher, [part.block for part in parts], modules)


def sequence_of(teacher: Teacher, blocks: Sequence[tuple[int, int]], modules: Sequence[nn.Module]) -> Any:
    """The modules of a student's parts as one, with the teacher's layers between them."""
    if len(modules) == 1:
        return modules[0]
    return PartSequence(modules, load_bridges(teacher, blocks, "cpu"))


def load_flow(run: Run, teacher: Teacher) -> nn.Module:
    """The trained flow layer of a run.

    Raises `RunError` if the file is damaged, or a tensor is missing, extra, or of another shape.
    """
    flow = build_flow(healed_teacher([run], teacher), run.parts)
    weights = load_weights(run)
    tensors = {name: value for name, value in weights.items() if not name.startswith(OF_TEACHER)}
    try:
        flow.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RunError(
            f"{run.path / WEIGHTS}: {reason}", "the flow layer's tensors", "train the run again"
        ) from error
    fill_buffers(teacher, flow)
    return flow.eval().requires_grad_(False)
