"""What lies beside a store, gathered for its page: results, curves, map, sweep, texts, commands."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lftpipe.base.errors import LftpipeError
from lftpipe.base.files import read_json
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.results.run import SAMPLES, Metrics, RunManifest, metrics_digest, read_metrics, read_samples
from lftpipe.results.scores import JOINED, Results
from lftpipe.results.sweep import Sweep

#: Samples of a run that a page shows, from the last.
MOST_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that lies beside a store and goes on its page.

    Parameters
    ----------
    recoupling, sweep
        The map and the sweep, None where there is none that can be read.
    runs
        Of each run its `name`, `facts` in a line, and `settings` as TOML.
    """

    results: Results
    curves: dict[str, Metrics]
    recoupling: RecouplingMap | None
    sweep: Sweep | None
    samples: list[dict[str, Any]]
    runs: list[dict[str, str]]
    commands: list[str]
    damage: list[str]

    @property
    def lines(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of metrics by run, of the runs that have some."""
        return {name: metrics.rows for name, metrics in self.curves.items() if metrics.rows}


def collect(here: Path) -> Found:
    """Gather what is there; all but the table may be missing, and what is damaged is said.

    Parameters
    ----------
    here
        The folder of an experiment: of `results.json`, `runs/` and the store.

    Raises
    ------
    LftpipeError
        If the table of results cannot be read.
    """
    results = Results.from_json(here / "results.json")
    names = sorted({name for row in results.rows if row.run for name in row.run.split(JOINED)})
    folders = {name: here / "runs" / name for name in names if (here / "runs" / name).is_dir()}
    curves = {
        name: read_metrics(each / "metrics.jsonl", metrics_digest(each)) for name, each in folders.items()
    }
    damage = [metrics.damage for metrics in curves.values() if metrics.damage]
    recoupling = _read(RecouplingMap, here / "recoupling.json", damage)
    sweep = _read(Sweep, here / "sweep.json", damage)
    return Found(
        results=results,
        curves=curves,
        recoupling=recoupling,
        sweep=sweep,
        samples=[sample for each in folders.values() for sample in _samples(each / SAMPLES, damage)],
        runs=[_facts(name, each) for name, each in folders.items()],
        commands=_commands(here, results, folders, recoupling),
        damage=damage,
    )


def _read(kind: Any, path: Path, damage: list[str]) -> Any:
    if not path.exists():
        return None
    try:
        return kind.from_json(path)
    except LftpipeError as error:
        damage.append(error.given)
        return None


def _samples(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    """The last samples of a run; a line that is none is left out and said."""
    found, damaged = read_samples(path)
    damage += damaged
    return [dataclasses.asdict(sample) for sample in found[-MOST_SAMPLES:]]


def _facts(name: str, folder: Path) -> dict[str, str]:
    """A run's digests and versions in a line, and its settings as they stand in its folder."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        manifest = {}
    versions = manifest.get("versions")
    shown = ", ".join(f"{key} {each}" for key, each in versions.items()) if isinstance(versions, dict) else ""
    settings = folder / "settings.toml"
    return {
        "name": name,
        "facts": "; ".join(
            (
                f"weights {manifest.get('weights_digest', '?')}",
                f"store {manifest.get('store_fingerprint', '?')}",
                shown or "versions unknown",
            )
        ),
        "settings": settings.read_text(errors="replace") if settings.is_file() else "",
    }


def _commands(
    here: Path, results: Results, folders: dict[str, Path], recoupling: RecouplingMap | None
) -> list[str]:
    """Commands as one types them, from what stores and files say of how they were made."""
    store = Path(results.store)
    commands = [_extract_command(store)] if (store / "zarr.json").is_file() else []
    if recoupling is not None:
        commands.append(_command("recouple", dict(recoupling.settings), store))
    commands += [_training_command(name, folder, store) for name, folder in folders.items()]
    commands.append(_command("evaluate", results.settings, store))
    return [*commands, f"lftpipe report --store {shlex.quote(str(store))} --force"]


def _training_command(name: str, folder: Path, store: Path) -> str:
    """What makes a run again."""
    manifest = _manifest(folder)
    command = "heal" if manifest is not None and manifest.healed else "train"
    words = ["lftpipe", command, "--recipe", str(folder / "settings.toml")]
    return shlex.join([*words, "--store", str(store), "--run", f"{name}-again"])


def _manifest(folder: Path) -> RunManifest | None:
    try:
        return RunManifest.from_json(folder / "manifest.json")
    except (OSError, LftpipeError):
        return None


def _extract_command(store: Path) -> str:
    try:
        made = read_json(store / "zarr.json", sealed=False)["attributes"]
        teacher, sequences, layers = made["teacher"], made["sequences"], made["layers"]
        whole = layers == list(range(teacher["layers"] + 1))
        options = {
            "model": teacher["model"],
            "revision": teacher["revision"],
            "corpus": made["corpus"],
            "layers": "all" if whole else ",".join(map(str, layers)) or None,
            "tokens_only": not layers,
            "context": made["context"],
            "tokens": sequences["train"] * made["context"],
            "validation_tokens": sequences["validation"] * made["context"],
            "logits": made.get("logits"),
            "dtype": made["dtype"],
            "compute_dtype": made["compute_dtype"],
            "batch_tokens": made["batch_sequences"] * made["context"],
            "attention": bool(made["attention_layers"]) if layers else None,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return f"# {store} does not say how it was made"
    return _command("extract", options, store)


def _command(name: str, options: dict[str, Any], store: Path) -> str:
    """A command with its options; of what says where files lie the store alone."""
    words = ["lftpipe", name, *(options.get("runs") or ()), "--store", str(store)]
    for key, value in options.items():
        option = "--" + key.replace("_", "-")
        if key in ("workspace", "store", "out", "force", "threads", "runs") or value is None or value == []:
            continue
        if isinstance(value, bool):
            if key == "attention" and not value:
                words.append("--no-attention")
            elif value and key != "attention":
                words.append(option)
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
