"""A finished run: its manifest, sealed, and the weights that it was written for."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lftpipe.artefacts.run import RunManifest
from lftpipe.errors import RunError
from lftpipe.files import file_digest, seal, write_atomic
from lftpipe.flow.solver import EVALUATIONS, Method
from lftpipe.runs.folder import MANIFEST, METRICS, SETTINGS, WEIGHTS
from lftpipe.workspace import command_of

#: Before the names of a teacher's tensors that healing changed, in a run's weights.
OF_TEACHER = "teacher."


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
        """NFE: layers that are evaluated in place of the block."""
        if self.velocity.get("skip"):
            return 0
        return self.velocity.get("depth", 1) * self.velocity.get("loops", 1) * EVALUATIONS[method] * k


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
    """Write weights, then the sealed manifest that makes the run a finished one.

    Parameters
    ----------
    manifest
        What is said of the run, JSON-plain; the digests are added here.
    changed
        Tensors of the teacher that are others now, by their names in its checkpoint.
    """
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

    Raises
    ------
    RunError
        If the folder is no finished run, or its manifest or weights were changed.
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
