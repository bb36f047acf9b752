"""Runs as lines of a table, and two runs side by side: from the files in their folders alone. No torch."""

import json
import tomllib
from pathlib import Path
from typing import Any

from lftpipe.base.errors import LftpipeError
from lftpipe.base.files import read_json
from lftpipe.results.facts import Comparison, RunLine
from lftpipe.results.run import RunManifest, read_metrics
from lftpipe.results.scores import Results, Score

#: Settings that say where and how a command ran, not what it made.
WHERE = frozenset(
    ("workspace", "store", "cache", "cache_bytes", "run", "resume", "force", "threads", "device", "target")
)

#: What the comparison of two evaluated runs shows, and its headings.
MEASURES = {
    "kl": "KL",
    "kl_latent": "KL_x",
    "nmse": "NMSE",
    "ppl": "PPL",
    "ppl_ratio": "PPL ratio",
    "agreement": "agreement",
    "k": "k",
    "solver": "solver",
    "nfe": "NFE",
    "parameters": "parameters",
    "ms_per_token": "ms/token",
}


def line_of(folder: Path) -> RunLine:
    """What there is to say of a run, finished or not."""
    known: dict[str, Any] = {"teacher": _experiment(folder).name, "run": folder.name, "path": str(folder)}
    try:
        manifest = RunManifest.from_json(folder / "manifest.json")
    except FileNotFoundError:
        return RunLine(**known, **_unfinished(folder))
    except LftpipeError:
        return RunLine(**known, state="damaged")
    best = best_score(folder)
    scores = {key: getattr(best, key) for key in ("k", "nfe", "kl", "ppl", "agreement")} if best else {}
    return RunLine(
        **known,
        **scores,
        state="finished",
        block=f"{manifest.block[0]}:{manifest.block[1]}" if len(manifest.parts) == 1 else manifest.shape,
        objective=manifest.objective,
        solver=manifest.solver,
        seed=manifest.seed,
        train_tokens=manifest.train_tokens,
        healed=manifest.healed is not None,
    )


def _experiment(folder: Path) -> Path:
    """The folder that `runs/` lies in."""
    return folder.resolve().parent.parent


def _unfinished(folder: Path) -> dict[str, Any]:
    """Of a run that is being trained, was interrupted, or diverged."""
    state = "diverged" if (folder / "diverged.json").exists() else "unfinished"
    try:
        settings = settings_of(folder)
    except LftpipeError:
        return {"state": "damaged"}
    rows = read_metrics(folder / "metrics.jsonl").rows
    named = {key: settings[key] for key in ("objective", "solver") if isinstance(settings.get(key), str)}
    block, seed = settings.get("block"), settings.get("seed")
    return named | {
        "state": state,
        "block": block if isinstance(block, str) else None,
        "seed": seed if isinstance(seed, int) else None,
        "train_tokens": rows[-1]["tokens"] if rows else 0,
        "healed": "adapter" in settings,
    }


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run, as `settings.toml` has them."""
    path = folder / "settings.toml"
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LftpipeError(
            f"{path}, which cannot be read", "a run's settings", "train the run again"
        ) from error
    found = tables.get("heal", tables.get("train"))
    return found if isinstance(found, dict) else {}


def scores_of(folder: Path) -> list[Score]:
    """The lines of Table 1 that belong to a run's present weights; none if it was not evaluated."""
    try:
        manifest = RunManifest.from_json(folder / "manifest.json")
        rows = Results.from_json(_experiment(folder) / "results.json").rows
    except (OSError, LftpipeError):
        return []
    own = [row for row in rows if manifest.weights_digest in row.weights]
    return [row for row in own if row.run == folder.name]


def best_score(folder: Path) -> Score | None:
    """The line with the lowest KL."""
    scored = [row for row in scores_of(folder) if row.kl is not None]
    return min(scored, key=lambda row: row.kl or 0.0, default=None)


def comparison(one: Path, other: Path) -> Comparison:
    """What differs between two finished runs.

    Raises `LftpipeError` if the settings of one cannot be read.
    """
    settings = [
        {key: value for key, value in settings_of(each).items() if key not in WHERE} for each in (one, other)
    ]
    differing = _differences(*settings)
    facts = [_made_from(each) for each in (one, other)]
    scores = [best_score(each) for each in (one, other)]
    results = {}
    if scores[0] and scores[1]:
        pairs = {key: [getattr(score, key) for score in scores] for key in MEASURES}
        results = {key: pair for key, pair in pairs.items() if pair != [None, None]}
    return Comparison(
        runs=[line_of(one), line_of(other)],
        settings=differing,
        same_settings=len(settings[0].keys() | settings[1].keys()) - len(differing),
        made_from=_differences(*facts),
        results=results,
    )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """By key, the values of both where they differ."""
    keys = [*one, *(key for key in other if key not in one)]
    return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def _made_from(folder: Path) -> dict[str, Any]:
    """Teacher, store and versions, one name each."""
    manifest = read_json(folder / "manifest.json")
    teacher, versions, healed = (manifest.get(key) or {} for key in ("teacher", "versions", "healed"))
    return {
        "teacher": teacher.get("model"),
        "teacher weights": teacher.get("weights_digest"),
        "store": manifest.get("store_fingerprint"),
        "healed": healed.get("run"),
        **{f"version of {name}": version for name, version in versions.items()},
    }


def shown(value: Any) -> str:
    """A value in a cell."""
    return value if isinstance(value, str) else json.dumps(value)
