"""Every stage's settings: frozen, documented, checked, and read from strict TOML recipes.

No torch here: `lftpipe --help` and a usage error cost nothing.
"""

import dataclasses
import os
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lftpipe.errors import SettingsError

Dtype = Literal["float16", "float32", "int8"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Metric = Literal["euclidean", "sqeuclidean", "cosine"]
Objective = Literal["fw", "sfm", "hybrid", "regression", "trajectory", "linear"]
SolverName = Literal["midpoint", "euler"]
LossScale = Literal["token", "channel", "none"]

DEFAULT_WORKSPACE = "data"


def default_workspace() -> Path:
    """`LFTPIPE_WORKSPACE`, or `data` in the current folder."""
    return Path(os.environ.get("LFTPIPE_WORKSPACE", DEFAULT_WORKSPACE))


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage takes."""

    workspace: Path = dataclasses.field(default_factory=default_workspace)
    """Folder under which every experiment lives."""
    store: Path | None = None
    """The store; left out, the only one in the workspace."""
    seed: int = 0
    threads: int | None = None
    """Processor threads; left out, torch's choice."""
    device: str = "cpu"
    force: bool = False
    """Overwrite what is there."""


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Common):
    """`lftpipe extract`: run the teacher once and store its states."""

    model: str = "pythia-tiny"
    """Registered name, Hub id, local folder, or `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    corpus: str | None = None
    """Registered name, file, folder, or `hf:<dataset>[:<config>[:<split>]]`; default: the teacher's."""
    layers: str = "all"
    """States to store: `all`, a list `6,18`, or a half-open range `0:13`."""
    context: int = 512
    """Tokens in a sequence."""
    tokens: int = 200_000
    """Training tokens, rounded up to whole sequences."""
    validation_tokens: int = 20_000
    attention: bool = True
    """Store each layer's attention-branch output too."""
    dtype: Dtype = "float16"
    """Format on disk."""
    compute_dtype: ComputeDtype = "auto"
    """`auto`: bfloat16 matrix products where the processor has them, the residual in float32."""
    batch_tokens: int = 2048
    """Tokens in one forward pass of the teacher."""
    dry_run: bool = False
    resume: bool = True


@dataclass(frozen=True, kw_only=True)
class RecoupleSettings(Common):
    """`lftpipe recouple`: the recoupling-ratio map over all pairs of stored states."""

    tokens: int = 256
    """Samples O in one optimal-transport problem."""
    batches: int = 8
    metric: Metric = "euclidean"
    layers: str = "all"
    standardise: bool = False
    """Divide each channel by its standard deviation first."""
    skip_first: bool = False
    """Leave out the first position of every sequence."""
    out: Path | None = None
    """The JSON file; default `recoupling.json` beside the store."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Common):
    """`lftpipe train`: learn one flow layer for one block."""

    block: str = "auto"
    """`m:n`, half-open, or `auto`: the best block of `replace` of the layers by the map."""
    replace: float = 0.25
    """Share of the layers that `--block auto` replaces."""
    objective: Objective = "fw"
    walk_steps: int = 3
    """Steps k of flow walking."""
    solver: SolverName = "midpoint"
    alpha: float = 0.001
    """Weight of SFM in the hybrid objective (eq. 9)."""
    loss_scale: LossScale = "token"
    """What a squared error is measured against: see `lftpipe.flow.objective`."""
    tokens: int = 1_000_000
    """Training tokens to see; the store is read again in a new order as often as needed."""
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    warmup: float = 0.05
    """Share of the steps with a rising learning rate; cosine decay follows."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    compute_dtype: ComputeDtype = "auto"
    from_teacher: bool = False
    """Run the teacher for every batch instead of reading the store: the cache's yardstick."""
    run: str | None = None
    """Name or path of the run; default: block, objective and seed."""
    resume: bool = False
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Common):
    """`lftpipe evaluate`: Table 1's rows over the whole validation split."""

    runs: tuple[str, ...] = dataclasses.field(default=(), metadata={"argument": True})
    """Names or paths of runs; none: every finished run beside the store."""
    k: tuple[int, ...] = (1, 2, 3, 8)
    """Step counts at inference."""
    skips: tuple[int, ...] = (1, 2, 3)
    """Numbers of layers, from the block's first, that the skip rows leave out."""
    batch_tokens: int = 2048
    compute_dtype: ComputeDtype = "float32"
    out: Path | None = None
    """The JSON file; default `results.json` beside the store. A `.md` file goes beside it."""


@dataclass(frozen=True, kw_only=True)
class InfoSettings(Common):
    """`lftpipe info`: what a store or a run holds, and from what it was made."""

    target: Path | None = dataclasses.field(default=None, metadata={"argument": True})
    """A store or a run; left out, the workspace's only store."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Common):
    """`lftpipe verify`: check every byte of a store against its manifest."""

    target: Path | None = dataclasses.field(default=None, metadata={"argument": True})
    """The store; left out, the workspace's only one."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Common):
    """`lftpipe report`: one page of everything that was found beside a store."""

    out: Path | None = None
    """The Markdown file; default `report.md` beside the store."""


S = TypeVar("S", bound=Common)


def parse_layers(text: str, num_states: int) -> tuple[int, ...]:
    """`all`, `6,18` or `0:13` to sorted state indices below `num_states`.

    Raises
    ------
    SettingsError
        If the text is of another form, the range is empty, or an index is out of range.
    """
    if text == "all":
        return tuple(range(num_states))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        start, stop = int(match[1]), int(match[2])
        if start >= stop:
            raise SettingsError(f"layers {text}", "a half-open range m:n with m < n", f"try {stop}:{start}")
        chosen = range(start, stop)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        chosen = sorted({int(part) for part in text.split(",")})
    else:
        raise SettingsError(f"layers {text!r}", "all, a list 6,18 or a range 0:13", "write it so")
    if chosen[-1] >= num_states:
        raise SettingsError(
            f"layers {text}",
            f"states from 0 to {num_states - 1}",
            f"name states below {num_states}",
        )
    return tuple(chosen)


def parse_block(text: str, num_layers: int) -> tuple[int, int]:
    """`m:n` to the half-open block of layers it replaces.

    Raises
    ------
    SettingsError
        If it is of another form, empty, or reaches past the last layer.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise SettingsError(f"block {text!r}", "m:n, as in 6:12", "write it so, or use auto")
    m, n = int(match[1]), int(match[2])
    if m >= n:
        raise SettingsError(
            f"block {text}", "m:n with m < n", f"try {n}:{m}" if n != m else f"try {m}:{m + 1}"
        )
    if n > num_layers:
        raise SettingsError(
            f"block {text}", f"n at most {num_layers}, the teacher's layers", "choose a block inside them"
        )
    return m, n


def check(settings: Common) -> None:
    """Refuse values outside their range and choices outside their `Literal`.

    Raises
    ------
    SettingsError
        Naming the setting, with the values it takes.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        option = f"--{field.name.replace('_', '-')} {value}"
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise SettingsError(option, f"one of {', '.join(typing.get_args(hint))}", "choose one of them")
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            least = _LEAST.get(field.name, 1)
            if number < least:
                raise SettingsError(option, f"at least {least}", f"raise --{field.name.replace('_', '-')}")
            if field.name in ("replace", "warmup") and number > 1:
                raise SettingsError(option, "a share of at most 1", f"lower --{field.name}")


#: Lowest values of the numeric settings whose lowest is not 1.
_LEAST: dict[str, float] = {
    "seed": 0,
    "context": 2,
    "validation_tokens": 0,
    "alpha": 0,
    "replace": 0,
    "warmup": 0,
    "weight_decay": 0,
    "learning_rate": 0,
    "clip": 0,
}


def from_recipe(kind: type[S], path: Path | None, table: str, given: dict[str, Any]) -> S:
    """Settings from a TOML recipe's `[table]`, overridden by what was `given` by name.

    Raises
    ------
    SettingsError
        If the recipe is no TOML, or holds a key that is no setting of this stage.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_recipe(path).get(table, {})
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise SettingsError(
                f"{key!r} in [{table}] of {path}",
                f"one of {', '.join(sorted(fields))}",
                "correct or remove the key",
            )
    hints = typing.get_type_hints(kind)
    merged = {key: _convert(value, hints[key], key) for key, value in values.items()}
    merged |= {key: value for key, value in given.items() if value is not None}
    settings = kind(**merged)
    check(settings)
    return settings


RECIPE_TABLES = ("extract", "recouple", "train", "evaluate")


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(
            f"recipe {path}", "a readable TOML file", f"check the path ({error.strerror})"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"recipe {path}", "TOML", f"mend it ({error})") from error
    for table, content in recipe.items():
        if table not in RECIPE_TABLES or not isinstance(content, dict):
            raise SettingsError(
                f"[{table}] in {path}", f"tables {', '.join(RECIPE_TABLES)}", "correct or remove the table"
            )
    return recipe


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A TOML value to a field's type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if Path in kinds:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = tuple(kind for kind in kinds if isinstance(kind, type))
    if (plain and not isinstance(value, plain)) or (int in kinds and isinstance(value, bool)):
        raise SettingsError(
            f"{key} = {value!r}", " or ".join(kind.__name__ for kind in plain), "correct the recipe"
        )
    return value


def to_plain(settings: Common) -> dict[str, Any]:
    """Settings as JSON- and TOML-ready values."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, tuple):
            value = list(value)
        if value is not None:
            plain[field.name] = value
    return plain
