"""The report: everything found beside a store, collected and written as one page."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import colormaps

from lftpipe.base.errors import LftpipeError
from lftpipe.base.files import read_json
from lftpipe.base.version import __version__
from lftpipe.reporting.plots import COLOUR_MAP, PREDICTOR_LABELS
from lftpipe.reporting.tables import COLUMNS, more_sections
from lftpipe.results.recoupling import RecouplingMap, Sweep
from lftpipe.results.run import SAMPLES, Metrics, RunManifest, metrics_digest, read_metrics, read_samples
from lftpipe.results.scores import JOINED, Results, Score

# --- What lies beside a store, gathered for its page: results, curves, map, sweep, texts, commands.

#: Samples of a run that a page shows, from the last.
MOST_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that lies beside a store and goes on its page.

    `recoupling`, `sweep`: the map and the sweep, None where there is none that can be read.
    `runs`: of each run its `name`, `facts` in a line, and `settings` as TOML.
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

    `here`: the folder of an experiment: of `results.json`, `runs/` and the store.
    Raises `LftpipeError` if the table of results cannot be read.
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


# --- Self-contained HTML pages: one file, no outside reference, works from `file://`. No torch.
#
# A page is a body, data as JSON, and the scripts of `lftpipe/reporting/page/` that draw the data. What
# comes from outside (names of models, corpora and runs, prompts, texts) goes into the data, which scripts
# show as text, or through `html.escape`.

#: Colours of the map's scale.
COLOUR_STEPS = 32

#: What the page shows of a map; the last only where a map has it.
MAP_KEYS = (
    *("layers", "ratio", "ratio_raw", "ratio_stderr", "transport_cost", "identity_cost", "random_cost"),
    *("relative_gap", "relative_displacement", "partners", "approximate", "settings", "store_fingerprint"),
    "influence",
)


def report_page(found: Found) -> str:
    """The page of a store: headline, Table 1, trade-offs, curves, map, sweep, texts, commands."""
    results = found.results
    rows = [row.to_json() for row in results.rows]
    data = {
        "teacher": results.teacher,
        "rows": rows,
        "columns": [[key, name] for key, name in COLUMNS.items() if any(key in row for row in rows)],
        "sections": [asdict(each) for each in more_sections(results.rows, results.comparisons or ())],
        "adaptive": [row.to_json() for row in results.adaptive or ()],
        "curves": found.lines,
        "damaged": found.damage,
        "map": None if found.recoupling is None else map_data(found.recoupling, _best_block(results.rows)),
        "sweep": None if found.sweep is None else _sweep_data(found.sweep),
        "samples": found.samples,
        "runs": found.runs,
        "commands": found.commands,
    }
    body = _fill(_part("report.html"), {"map": _part("map.html")})
    about = f"{results.validation_tokens:,} validation tokens; store {results.store_fingerprint}"
    body = body.replace('id="about"></p>', f'id="about">{escape(about)}</p>')
    scripts = ("base.js", "chart.js", "table.js", "results.js", "extras.js", "map.js", "contents.js")
    return page(f"Students of {results.teacher}", body, data, scripts)


def _sweep_data(sweep: Sweep) -> dict[str, Any]:
    """The sweep, and the figures that all its blocks have."""
    names = [
        [key, name]
        for key, name in PREDICTOR_LABELS.items()
        if all(getattr(row, key) is not None for row in sweep.rows)
    ]
    return sweep.to_json() | {"predictors": names}


def recoupling_page(recoupling: RecouplingMap) -> str:
    """The page of a map alone."""
    title = f"Recoupling map of {recoupling.teacher or 'a teacher'}"
    return page(title, _part("map.html"), {"map": map_data(recoupling)}, ("base.js", "map.js", "contents.js"))


def map_data(recoupling: RecouplingMap, shown: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the script of the map draws: the map, its colours, and the pair that it shows at first.

    `shown`: a block `(m, n)`; left out, or not on the map, the first pair is shown.
    """
    colours = [
        [round(255 * part) for part in colormaps[COLOUR_MAP](step / (COLOUR_STEPS - 1))[:3]]
        for step in range(COLOUR_STEPS)
    ]
    layers = recoupling.layers
    on_map = shown is not None and all(layer in layers for layer in shown)
    first = [layers.index(layer) for layer in shown] if shown and on_map else [0, 1]
    found = recoupling.to_json()
    kept = {key: found[key] for key in MAP_KEYS if found.get(key) is not None}
    return kept | {"colours": colours, "shown": first}


def page(title: str, body: str, data: dict[str, Any], scripts: tuple[str, ...]) -> str:
    """One HTML file.

    `data`: for the scripts; numbers that are not finite become null.
    """
    embedded = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return _fill(
        _part("page.html"),
        {
            "title": escape(title),
            "style": _part("page.css"),
            "body": body,
            "version": escape(__version__),
            # No text can end the element that it stands in, or begin a comment there.
            "data": embedded.replace("<", "\\u003c"),
            "script": "\n".join(_part(name) for name in scripts),
        },
    )


def _part(name: str) -> str:
    return (resources.files("lftpipe.reporting") / "page" / name).read_text("utf-8")


def _fill(template: str, parts: dict[str, str]) -> str:
    """Put parts in the places of `{{name}}`, in one pass: what was put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts.get(place[1], place[0]), template)


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _best_block(rows: Sequence[Score]) -> tuple[int, int] | None:
    """The block of the student with the lowest KL; None of one with several blocks."""
    best = min(
        (row for row in rows if row.run and row.kl is not None), key=lambda row: row.kl or 0, default=None
    )
    match = re.fullmatch(r"(\d+):(\d+)", best.block or "") if best else None
    return (int(match[1]), int(match[2])) if match else None
