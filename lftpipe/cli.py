"""The command line: parse, call one stage, print what it says or its error.

The options of a command are the fields of its settings, so the two cannot drift apart. Stages are
imported when they are called: `lftpipe --help` needs no torch.
"""

import ast
import dataclasses
import errno
import importlib
import inspect
import json
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import lftpipe
from lftpipe import progress
from lftpipe.config import settings as settings_module
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import Common
from lftpipe.errors import LftpipeError, SettingsError

app = typer.Typer(
    name="lftpipe",
    help="Train Latent Flow Transformers from a cache of the teacher's hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Command, its settings, and where its function is.
COMMANDS: dict[str, tuple[str, str]] = {
    "extract": ("ExtractSettings", "lftpipe.stages.extract:extract"),
    "recouple": ("RecoupleSettings", "lftpipe.stages.recouple:recouple"),
    "train": ("TrainSettings", "lftpipe.stages.train:train"),
    "evaluate": ("EvaluateSettings", "lftpipe.stages.evaluate:evaluate"),
    "sweep": ("SweepSettings", "lftpipe.stages.sweep:sweep"),
    "toy": ("ToySettings", "lftpipe.stages.toy:toy"),
    "export": ("ExportSettings", "lftpipe.stages.export:export"),
    "generate": ("GenerateSettings", "lftpipe.stages.generate:generate"),
    "info": ("InfoSettings", "lftpipe.stages.info:info"),
    "verify": ("VerifySettings", "lftpipe.stages.verify:verify"),
    "report": ("ReportSettings", "lftpipe.stages.report:report"),
}

#: Options with two spellings.
SPELLINGS = {"from_teacher": "--from-teacher/--from-cache"}

_extra = {
    "recipe": Annotated[Path | None, typer.Option(help="TOML file with a table for this command.")],
    "json_output": Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")],
    "debug": Annotated[bool, typer.Option(help="Show the traceback of an error.")],
}


def _field_docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a settings class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(after.value, ast.Constant)
                docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def _option(field: dataclasses.Field[Any], hint: Any, doc: str) -> Any:
    """The typer annotation of one settings field; every option defaults to 'not given'."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # pyright: ignore
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if field.metadata.get("argument"):
        many = typing.get_origin(hint) is tuple
        return Annotated[(list[str] if many else hint) | None, typer.Argument(help=doc, show_default=False)]
    if field.metadata.get("repeated"):
        hint = list[str]
    if isinstance(default, tuple):
        hint, default = str, ",".join(map(str, default))
    # Not in brackets: those are markup to rich, which would leave the default out.
    shown = f" (default: {default})" if default is not None and default != () and hint is not bool else ""
    names = [SPELLINGS[field.name]] if field.name in SPELLINGS else []
    return Annotated[hint | None, typer.Option(*names, help=doc + shown, show_default=False)]


def _parse(name: str, hint: Any, value: Any) -> Any:
    """A list option's text to its tuple; an option given several times to one text."""
    if isinstance(value, list) and hint in (str, str | None):
        return ",".join(value)
    if typing.get_origin(hint) is not tuple or not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    number = typing.get_args(hint)[0]
    try:
        return tuple(number(part) for part in value.split(","))
    except ValueError as error:
        example = "1,2,3" if number is int else "0.02,0.05"
        raise SettingsError(
            f"--{name} {value}", f"numbers with commas between, as in {example}", "write it so"
        ) from error


def _command(name: str, kind: type[Common], place: str) -> Callable[..., None]:
    hints, docs = typing.get_type_hints(kind), _field_docs(kind)
    fields = [field for field in dataclasses.fields(kind) if not field.metadata.get("recipe")]

    def run(**given: Any) -> None:
        recipe, as_json, debug = (given.pop(key) for key in ("recipe", "json_output", "debug"))

        def call() -> None:
            parsed = {key: _parse(key, hints[key], value) for key, value in given.items()}
            parsed = {key: value for key, value in parsed.items() if value not in (None, (), "")}
            settings = from_recipe(kind, recipe, name, parsed)
            module, function = place.split(":")
            stage = importlib.import_module(module)
            if getattr(stage, "STREAMS", False) and not as_json:
                result = getattr(stage, function)(settings, sys.stdout)
            else:
                result = getattr(stage, function)(settings)
            if not progress.speaks():
                return
            if as_json:
                print(json.dumps(result))
            else:
                _print(stage.summary(result))
            if cure := result.get("failed"):
                _fail(cure)

        guarded(call, debug=debug, asks_to_resume="resume" in hints)

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_option(field, hints[field.name], docs.get(field.name, "")),
        )
        for field in fields
    ]
    extra_defaults = {"recipe": None, "json_output": False, "debug": False}
    parameters += [
        inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=extra_defaults[key], annotation=annotation
        )
        for key, annotation in _extra.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__doc__ = (kind.__doc__ or "").split(": ", 1)[-1].strip().capitalize()
    return run


def _print(summary: Any) -> None:
    from rich.console import Console

    # No markup: paths may have brackets in them.
    Console(soft_wrap=isinstance(summary, str), highlight=False, markup=False).print(summary)


def guarded(call: Callable[[], None], *, debug: bool, asks_to_resume: bool) -> None:
    """Run a stage; an error becomes one line and exit status 1.

    After an interrupt the same command goes on, in some stages only if it is asked to.
    """
    try:
        call()
    except LftpipeError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        command = "the same command with --resume goes on" if asks_to_resume else "run the same command again"
        _fail(f"given: an interrupt / expected: to run to the end / do: {command}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug:
            raise
        cure = {
            errno.ENOSPC: "free space on that disk and run the same command again",
            errno.EACCES: "give yourself the right to it, or name another place",
            errno.EROFS: "name another place with --workspace or --store",
        }.get(error.errno or 0, "see what is there, or run again with --debug")
        where = f" at {error.filename}" if error.filename else ""
        _fail(f"given: {error.strerror or error}{where} / expected: to read and write there / do: {cure}")
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())[:300]
        _fail(
            f"given: {type(error).__name__}: {reason} / expected: no such thing, a defect of lftpipe / "
            "do: run again with --debug and report what it shows"
        )


def _fail(line: str, status: int = 1) -> None:
    print("error: " + " ".join(line.split()), file=sys.stderr)
    raise typer.Exit(status)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(lftpipe.__version__)
        raise typer.Exit


for _name, (_kind, _place) in COMMANDS.items():
    app.command(_name)(_command(_name, getattr(settings_module, _kind), _place))


def main() -> None:
    """Entry point of the `lftpipe` command."""
    app()
