"""Who may know whom: the import table of the package, read from its sources."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lftpipe").rglob("*.py"))
EVERYTHING = [
    path
    for folder in ("lftpipe", "tests", "benchmarks", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Modules that a source file names, all of them or only those outside functions."""
    found: set[str] = set()
    stack: list[ast.AST] = [parsed(path)]
    while stack:
        node = stack.pop()
        if type_checking_only(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            stack += ast.iter_child_nodes(node)
    return found


def knows(path: Path, names: tuple[str, ...], *, at_import_time: bool = False) -> set[str]:
    return {
        name
        for name in imports(path, at_import_time=at_import_time)
        if any(name == each or name.startswith(each + ".") for each in names)
    }


#: A room, the rooms and modules of lftpipe that it may know beside itself, and libraries that it must not.
ROOMS: dict[str, tuple[str, str]] = {
    "errors": ("", "torch numpy transformers zarr"),
    "files": ("", "torch numpy transformers zarr"),
    "artefacts": ("errors files", "torch numpy transformers zarr"),
    "outputs": ("errors files", "torch numpy transformers zarr"),
    "progress": ("", "torch numpy transformers zarr"),
    "workspace": ("errors outputs", "torch numpy transformers zarr"),
    "device": ("errors", "transformers zarr"),
    "spawned": ("", "transformers zarr"),
    "config": ("errors", "torch numpy transformers zarr"),
    "corpus": ("errors", "torch transformers zarr"),
    "teacher": ("errors device", "zarr"),
    "objects": ("errors files", "torch numpy transformers zarr"),
    "store": ("errors files objects", "torch transformers"),
    "batch": ("corpus device store teacher", "transformers zarr"),
    "live": ("batch store teacher", "transformers zarr"),
    "extraction": (
        "artefacts batch errors config corpus device files objects progress spawned store teacher workspace",
        "zarr",
    ),
    "recoupling": ("artefacts errors config corpus device flow outputs progress store", "transformers zarr"),
    "flow": (
        "teacher.branches teacher.context teacher.family",
        "transformers safetensors zarr pathlib json os",
    ),
    "runs": ("artefacts config errors files flow teacher workspace", "transformers zarr"),
    "training": (
        "artefacts batch config device errors files flow live objects outputs progress runs spawned "
        "store teacher",
        "transformers zarr",
    ),
    "student": ("artefacts config errors flow runs teacher", "zarr"),
    "evaluation": (
        "artefacts batch config device errors files flow live progress runs store teacher",
        "transformers zarr",
    ),
    "reporting": (
        "artefacts evaluation.correlation outputs recoupling.ranking errors teacher.registry",
        "torch transformers zarr",
    ),
    "stages": (
        "artefacts config corpus device errors evaluation extraction files flow live objects outputs "
        "progress recoupling reporting runs store student teacher training workspace",
        "",
    ),
    "api": ("config errors objects reporting runs store student", "torch numpy transformers zarr"),
    "cli": (
        "config errors objects progress reporting.terminal",
        "torch numpy transformers zarr",
    ),
}

#: Modules that know less than their rooms do.
STRICTER: dict[str, tuple[str, str]] = {
    "cli.interrupt": ("", "torch numpy transformers zarr pydantic typer"),
    "cli.guard": ("errors cli.interrupt progress", "torch numpy transformers zarr pydantic"),
    "reporting.terminal": ("", "torch numpy transformers zarr pydantic"),
    "teacher.family": ("", "transformers pathlib"),
    "teacher.context": ("", "transformers pathlib"),
    "teacher.branches": ("teacher.context teacher.family", "transformers pathlib"),
    "recoupling.assignment": ("", "torch transformers zarr"),
    "recoupling.coupling": (
        "config recoupling.assignment recoupling.clouds recoupling.costs",
        "torch transformers",
    ),
    "evaluation.correlation": ("", "torch transformers zarr"),
    "stages.train": (
        "artefacts config device errors progress recoupling runs store teacher training workspace",
        "transformers",
    ),
    "stages.recouple": (
        "artefacts config device errors outputs recoupling reporting store workspace",
        "transformers",
    ),
    "stages.report": ("artefacts config errors outputs reporting runs store workspace", "torch transformers"),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lftpipe").with_suffix("").parts[0]


def test_no_two_files_of_tests_have_the_same_name():
    """Pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in SOURCES} == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", [*ROOMS, *STRICTER])
def test_a_room_knows_only_what_the_table_says(room):
    known, forbidden = (ROOMS | STRICTER)[room]
    allowed = tuple(f"lftpipe.{name}" for name in (*known.split(), room if room in ROOMS else ""))
    files = [path for path in SOURCES if f"{module_of(path)}.".startswith(f"lftpipe.{room}.")]
    assert files, f"there is no {room}"
    for path in files:
        named = {name for name in imports(path) if name.startswith("lftpipe.")}
        rest = {n for n in named if not any(f"{n}.".startswith(f"{each}.") for each in allowed)}
        # `from lftpipe.flow import path` names the package too, which is no secret.
        rest -= {each.rsplit(".", 1)[0] for each in allowed}
        assert rest == set(), path
        assert knows(path, tuple(forbidden.split())) == set(), path


def test_a_stage_never_imports_a_stage():
    stages = sorted((ROOT / "lftpipe/stages").glob("*.py"))
    assert stages
    assert [path for path in stages if knows(path, ("lftpipe.stages",))] == []


def test_training_from_the_cache_knows_no_trunk():
    """`train` from the cache and `evaluate` run single layers; the trunk is for extraction."""
    for path in SOURCES:
        if module_of(path) not in (
            "lftpipe.live",
            "lftpipe.teacher.logits",
            "lftpipe.teacher.streamed",
            "lftpipe.teacher.trunk",
        ):
            allowed = module_of(path).startswith(("lftpipe.extraction", "lftpipe.stages.extract"))
            assert allowed or not knows(path, ("lftpipe.teacher.trunk",)), path
        # Also where it is named inside a function, it is only for `--from-teacher`.
        if module_of(path) == "lftpipe.training.live":
            assert not knows(path, ("lftpipe.teacher.trunk",), at_import_time=True)


def test_nobody_imports_the_command_line():
    own = ("lftpipe.cli", "lftpipe.__main__")
    outside = [path for path in SOURCES if not module_of(path).startswith(own)]
    assert [path for path in outside if knows(path, ("lftpipe.cli",))] == []


def test_models_are_loaded_only_where_a_trunk_is():
    """`AutoModel` and its kin: the trunk, the conversion of GGUF files, and students."""
    allowed = ("lftpipe.teacher.trunk", "lftpipe.teacher.gguf", "lftpipe.teacher.skeleton")
    rooms = ("lftpipe.student", "lftpipe.stages.")
    outside = [
        path for path in SOURCES if module_of(path) not in allowed and not module_of(path).startswith(rooms)
    ]
    loaders = ("transformers.AutoModel", "transformers.AutoModelForCausalLM")
    assert [path for path in outside if knows(path, loaders)] == []


def effects(path: Path) -> list[str]:
    """What a module's body does rather than defines: loops, and bare calls that register nothing."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in parsed(path).body
        if isinstance(node, ast.For | ast.While | ast.With)
        or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant))
        if "register" not in ast.unparse(node)
    ]


def test_importing_has_no_effects():
    commands = ROOT / "lftpipe/cli/app.py"  # registers its commands
    assert [effect for path in SOURCES if path != commands for effect in effects(path)] == []


def test_no_module_is_called_utils():
    assert not [path for path in EVERYTHING if path.stem in ("utils", "helpers", "common", "misc")]


def test_no_file_is_endless():
    lengths = {path: len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from its name to its end, without the docstring."""

    def count(node: ast.stmt) -> int:
        return (node.end_lineno or node.lineno) - node.lineno + 1

    return count(function) - (0 if ast.get_docstring(function) is None else count(function.body[0]))


def test_no_function_is_endless():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": lines_of(node)
        for path in EVERYTHING
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_training_from_the_cache_runs_no_teacher(stores, tmp_path):
    """In a process of its own, where loading a model in any of transformers' ways is an error."""
    code = """
import sys
import transformers
from transformers import PreTrainedModel

def refuse(*arguments, **options):
    raise SystemExit("a model was loaded")

PreTrainedModel.from_pretrained = PreTrainedModel.__init__ = refuse
for name in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
    getattr(transformers, name).from_pretrained = refuse
sys.modules["lftpipe.teacher.trunk"] = None  # importing it is an error
from lftpipe.cli.app import app
for command in {commands}:
    app(command, standalone_mode=False)
"""
    store, run, results = str(stores["neox"]), tmp_path / "run", tmp_path / "results.json"
    options = ["--block", "1:3", "--tokens", "64", "--batch-tokens", "64", "--run", str(run)]
    commands = [
        ["train", "--from-cache", *options, "--store", store, "--debug"],
        ["evaluate", str(run), "--store", store, "--out", str(results), "--debug"],
    ]
    code = code.replace("{commands}", repr(commands))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert (run / "flow.safetensors").is_file()
    assert results.is_file()
