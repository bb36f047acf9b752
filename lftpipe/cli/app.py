"""The command line: parse, call one stage, print what it says or its error.

The options of a command are the fields of its settings, so the two cannot drift apart. Settings and stages
are imported when a command is called: `lftpipe --help` needs neither pydantic nor torch.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lftpipe.base import progress
from lftpipe.base.allocator import keep_freed_memory
from lftpipe.base.version import __version__
from lftpipe.cli import interrupt
from lftpipe.cli.guard import fail, guarded

PIPELINE, STUDENT, LOOK = "The pipeline", "Use a student", "Look at what is there"


@dataclass(frozen=True)
class Command:
    """One command, before anything of it is imported."""

    settings: str
    """The class of its settings."""
    stage: str
    """Where its function is, as module:function."""
    panel: str
    """Under which title the help lists it."""
    help: str


COMMANDS = {
    "compress": Command(
        "CompressSettings",
        "lftpipe.commands.compress:compress",
        PIPELINE,
        "Make a smaller model of a model: all stages in one command.",
    ),
    "extract": Command(
        "ExtractSettings",
        "lftpipe.commands.extract:extract",
        PIPELINE,
        "Run the teacher once and store its hidden states.",
    ),
    "recouple": Command(
        "RecoupleSettings",
        "lftpipe.commands.recouple:recouple",
        PIPELINE,
        "Map the recoupling ratio over all pairs of stored states.",
    ),
    "train": Command(
        "TrainSettings",
        "lftpipe.commands.train:train",
        PIPELINE,
        "Learn a flow layer for a block, or for several blocks.",
    ),
    "plan": Command(
        "PlanSettings",
        "lftpipe.commands.plan:plan",
        PIPELINE,
        "Choose the best shape for a budget, of candidates trained alone.",
    ),
    "heal": Command(
        "HealSettings",
        "lftpipe.commands.heal:heal",
        PIPELINE,
        "Train a run's layer together with the layers around it.",
    ),
    "evaluate": Command(
        "EvaluateSettings",
        "lftpipe.commands.evaluate:evaluate",
        PIPELINE,
        "Score runs over the whole validation split, as in the paper's Table 1.",
    ),
    "report": Command(
        "ReportSettings",
        "lftpipe.commands.report:report",
        PIPELINE,
        "Write one page about everything found beside a store.",
    ),
    "export": Command(
        "ExportSettings",
        "lftpipe.commands.export:export",
        STUDENT,
        "Write a student as a folder that transformers loads.",
    ),
    "generate": Command(
        "GenerateSettings",
        "lftpipe.commands.generate:generate",
        STUDENT,
        "Continue a prompt with a student, and measure its speed.",
    ),
    "recognise": Command(
        "RecogniseSettings",
        "lftpipe.commands.recognise:recognise",
        STUDENT,
        "Run a recogniser of speech or of text in images once, and keep what it heard.",
    ),
    "fuse": Command(
        "FuseSettings",
        "lftpipe.commands.fuse:fuse",
        STUDENT,
        "Correct what a recogniser heard by a language model, step by step.",
    ),
    "push": Command(
        "PushSettings",
        "lftpipe.commands.push:push",
        STUDENT,
        "Upload a store, a run or an exported student to the Hugging Face Hub.",
    ),
    "pull": Command(
        "PullSettings",
        "lftpipe.commands.pull:pull",
        STUDENT,
        "Bring a store or a run here from the Hugging Face Hub, and check it.",
    ),
    "info": Command(
        "InfoSettings",
        "lftpipe.commands.info:info",
        LOOK,
        "Show what a store or a run holds, and what it was made from.",
    ),
    "runs": Command(
        "RunsSettings",
        "lftpipe.commands.runs:runs",
        LOOK,
        "List every run of a workspace with its block, objective, tokens and scores.",
    ),
    "compare": Command(
        "CompareSettings",
        "lftpipe.commands.compare:compare",
        LOOK,
        "Show what differs between two runs, in settings and results.",
    ),
    "verify": Command(
        "VerifySettings",
        "lftpipe.commands.verify:verify",
        LOOK,
        "Check every byte of a store against its manifest.",
    ),
    "sweep": Command(
        "SweepSettings",
        "lftpipe.commands.sweep:sweep",
        LOOK,
        "Train a short run for every block of some lengths: does the map predict their errors?",
    ),
    "toy": Command(
        "ToySettings",
        "lftpipe.commands.toy:toy",
        LOOK,
        "Draw figure 3: paired points of the plane under every objective.",
    ),
}


class Commands(TyperGroup):
    """The commands by name and help; a command's options are made when it is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name, help=command.help, rich_help_panel=command.panel)
            for name, command in COMMANDS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was typed, with its options."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and command_of(str(name)), rest


app = typer.Typer(
    name="lftpipe",
    cls=Commands,
    help="Train Latent Flow Transformers from a cache of the teacher's hidden states.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def command_of(name: str) -> Any:
    """The whole command, made from the fields of its settings."""
    alone = typer.Typer(add_completion=False)
    alone.command(name, help=COMMANDS[name].help)(_function(name))
    return typer.main.get_command(alone)


def _function(name: str) -> Callable[..., None]:
    from lftpipe.cli.options import parameters, parse
    from lftpipe.config import settings as settings_module
    from lftpipe.config.recipe import from_recipe
    from lftpipe.storage import mirror

    command = COMMANDS[name]
    kind = getattr(settings_module, command.settings)
    module, function = command.stage.split(":")

    def run(**given: Any) -> None:
        recipe, as_json, debug = (given.pop(key) for key in ("recipe", "json_output", "debug"))

        def call() -> None:
            settings = from_recipe(kind, recipe, name, parse(kind, given))
            stage = importlib.import_module(module)
            interrupt.raise_in_stage()
            if getattr(stage, "STREAMS", False) and not as_json:
                result = mirror.run(lambda here: getattr(stage, function)(here, sys.stdout), settings)
            else:
                result = mirror.run(getattr(stage, function), settings)
            if not progress.speaks():
                return
            if as_json:
                print(json.dumps(result.to_json()))
            else:
                _print(stage.summary(result))
            if cure := result.get("failed"):
                fail(cure)

        guarded(call, debug=debug, asks_to_resume=hasattr(kind, "resume"))

    run.__signature__ = inspect.Signature(parameters(kind))  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _print(summary: Any) -> None:
    from lftpipe.reporting.terminal import print_plainly

    print_plainly(summary)


def with_values(arguments: list[str]) -> list[str]:
    """The same arguments, with `--ray` as `--ray=local` where no address follows it."""
    following = [*arguments, "-"][1:]
    return [
        "--ray=local" if each == "--ray" and after.startswith("-") else each
        for each, after in zip(arguments, following, strict=True)
    ]


def main() -> None:
    """Parse and run the command line."""
    keep_freed_memory()
    app(args=with_values(sys.argv[1:]), prog_name="lftpipe")
