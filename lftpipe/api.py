"""The public Python API: stores and students to open, and each stage as a function.

>>> import lftpipe
>>> options = {"layers": "5,8", "attention": False, "tokens": 2_048, "validation_tokens": 512}
>>> made = lftpipe.extract(model="pythia-tiny", **options)
>>> store = lftpipe.open_store(made["store"])
>>> store.layers, store.read("train", 5, [0, 1]).shape
((5, 8), (2, 512, 192))
>>> batch = next(iter(store.batches("train", [5, 8], batch_size=2, seed=0)))
>>> batch.states[8].shape
(2, 512, 192)
>>> run = lftpipe.train(block="5:8", objective="linear")
>>> run["objective"], run["block"]
('linear', [5, 8])
>>> [row["run"] for row in lftpipe.list_runs()["rows"]]
['5-8-linear-seed0']
>>> type(lftpipe.load_student(run["run"])).__mro__[1].__name__
'LatentFlow'
"""

import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from lftpipe.config import settings
from lftpipe.config.loss import add_term as add_term
from lftpipe.config.settings import Common

if TYPE_CHECKING:
    from lftpipe.store import Store

Options = ParamSpec("Options")


class Result(Mapping[str, Any]):
    """What a stage found or made: a mapping with the keys that `--json` prints; a table in notebooks.

    Parameters
    ----------
    stage
        The name of the command.
    values
        What the stage returned.
    summary
        From that to what the command line shows of it.
    """

    def __init__(self, stage: str, values: Mapping[str, Any], summary: Callable[[Any], Any]) -> None:
        self.stage = stage
        self._values = values
        self._summary = summary

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        """What the command line prints, as text."""
        from rich.console import Console

        console = Console(width=140, record=True, file=_Nowhere(), highlight=False, markup=False)
        console.print(self._summary(self._values))
        return console.export_text().rstrip()

    def _repr_html_(self) -> str:
        rows = self._values.get("rows")
        if not isinstance(rows, list) or not rows:
            return f"<pre>{escape(repr(self))}</pre>"
        from lftpipe.reporting.tables import COLUMNS, cell

        names = {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}
        if "method" not in rows[0]:  # not Table 1: all there is
            names = {str(key): COLUMNS.get(key) or str(key) for key in rows[0]}
        head = "".join(f"<th>{escape(name)}</th>" for name in names.values())
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell(row.get(key)))}</td>" for key in names) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class _Nowhere(io.StringIO):
    """A file that keeps nothing: the console records what it prints."""

    def write(self, text: str) -> int:
        return len(text)


def _stage(kind: Callable[Options, Common], place: str) -> Callable[Options, Result]:
    """A stage as a function whose keywords are the options of its command."""
    module, name = place.split(":")

    def run(*arguments: Options.args, **options: Options.kwargs) -> Result:
        from lftpipe.storage import mirror

        stage = importlib.import_module(module)
        values = mirror.run(getattr(stage, name), kind(*arguments, **options))
        return Result(name, values, stage.summary)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"""`lftpipe {name}` as a function; its keywords are the command's options.

    Parameters
    ----------
    **options
        The fields of `lftpipe.config.settings.{getattr(kind, "__name__", "")}`, documented there and by
        `lftpipe {name} --help`.

    Returns
    -------
    Result
        The keys that `--json` prints.

    Raises
    ------
    LftpipeError
        In every case in which the command ends with an error line.
    """
    return run


extract = _stage(settings.ExtractSettings, "lftpipe.commands.extract:extract")
recouple = _stage(settings.RecoupleSettings, "lftpipe.commands.recouple:recouple")
train = _stage(settings.TrainSettings, "lftpipe.commands.train:train")
compress = _stage(settings.CompressSettings, "lftpipe.commands.compress:compress")
plan = _stage(settings.PlanSettings, "lftpipe.commands.plan:plan")
heal = _stage(settings.HealSettings, "lftpipe.commands.heal:heal")
evaluate = _stage(settings.EvaluateSettings, "lftpipe.commands.evaluate:evaluate")
sweep = _stage(settings.SweepSettings, "lftpipe.commands.sweep:sweep")
toy = _stage(settings.ToySettings, "lftpipe.commands.toy:toy")
export = _stage(settings.ExportSettings, "lftpipe.commands.export:export")
generate = _stage(settings.GenerateSettings, "lftpipe.commands.generate:generate")
info = _stage(settings.InfoSettings, "lftpipe.commands.info:info")
recognise = _stage(settings.RecogniseSettings, "lftpipe.commands.recognise:recognise")
fuse = _stage(settings.FuseSettings, "lftpipe.commands.fuse:fuse")
push = _stage(settings.PushSettings, "lftpipe.commands.push:push")
pull = _stage(settings.PullSettings, "lftpipe.commands.pull:pull")
list_runs = _stage(settings.RunsSettings, "lftpipe.commands.runs:runs")
compare_runs = _stage(settings.CompareSettings, "lftpipe.commands.compare:compare")
verify = _stage(settings.VerifySettings, "lftpipe.commands.verify:verify")
report = _stage(settings.ReportSettings, "lftpipe.commands.report:report")


def open_store(path: str | Path) -> "Store":
    """Open a finished store.

    Parameters
    ----------
    path
        The folder, `<workspace>/<teacher>/states.zarr`.

    Returns
    -------
    Store
        `read` gives arrays, `batches` shuffled training batches, `to_xarray` a lazy data set.

    Raises
    ------
    StoreError
        If there is no store, or it is incomplete or damaged.
    """
    from lftpipe.store import Store

    return Store.open(Path(path))


def load_student(path: str | Path, *, k: int | None = None, solver: str | None = None) -> Any:
    """A student as a transformers model, in float32 and ready to generate.

    Parameters
    ----------
    path
        The folder of a run (of several that were trained as one student: of any of them), or one that
        `lftpipe export` wrote.
    k, solver
        Steps and solver of its flows; default: those of training or export.

    Returns
    -------
    PreTrainedModel
        Of the teacher's own class, with a flow layer in place of each block.

    Raises
    ------
    LftpipeError
        If there is no such student, or it is damaged, or its teacher changed.
    """
    from lftpipe import runs
    from lftpipe.student.assemble import build_student, load_model, teacher_of_run

    folder = Path(path)
    if not (folder / "config.json").is_file():
        opened = [runs.open_run(folder)]
        there = folder.resolve().parent  # <workspace>/<teacher>/runs, if it lies in one
        workspace = there.parents[1] if there.name == "runs" else settings.TrainSettings().workspace
        teacher = teacher_of_run(opened[0], workspace)
        return build_student(teacher, opened, steps=k, solver=solver)
    model = load_model(folder)
    if k is not None or solver is not None:
        model.set_steps(k or model.config.steps, solver)
    return model
