"""The table of rooms and floors, and what every file keeps to, read from the sources."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHECK_TYPES
from waiting import Child

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lftpipe").rglob("*.py"))
EVERYTHING = [
    path
    for folder in ("lftpipe", "tests", "benchmarks", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
]

#: Rooms by floor: a room imports rooms of lower floors and nothing else of lftpipe.
FLOORS: tuple[str, ...] = (
    "base",
    "results config storage corpus families",
    "teacher store flow fusion",
    "data runs",
    "extraction recoupling student training evaluation",
    "reporting planning",
    "commands",
    "api",
    "cli",
)

NO_ARRAYS = "torch numpy transformers zarr"

#: Libraries that a room, or one of its files, does not import at all.
WITHOUT: dict[str, str] = {
    "base": "zarr",
    "base.errors": NO_ARRAYS,
    "base.files": NO_ARRAYS,
    "base.outputs": NO_ARRAYS,
    "base.progress": NO_ARRAYS,
    "base.workspace": NO_ARRAYS,
    "results": NO_ARRAYS,
    "config": NO_ARRAYS,
    "storage": NO_ARRAYS,
    "corpus": "torch transformers zarr",
    "families": "safetensors zarr",
    "families.branches": "transformers pathlib",
    "families.family": "transformers pathlib",
    "teacher": "zarr",
    "store": "torch transformers",
    "flow": "transformers safetensors zarr pathlib json os",
    "fusion": "zarr",
    "data": "transformers zarr",
    "runs": "transformers zarr",
    "extraction": "zarr",
    "recoupling": "transformers zarr",
    "recoupling.coupling": "torch transformers",
    "recoupling.ranking": NO_ARRAYS,
    "student": "zarr",
    "training": "transformers zarr",
    "evaluation": "transformers zarr",
    "planning": "transformers zarr",
    "planning.choice": "torch transformers zarr",
    "reporting": "torch transformers zarr",
    "reporting.terminal": f"{NO_ARRAYS} pydantic",
    "commands.train": "transformers",
    "commands.recouple": "transformers",
    "commands.report": "torch transformers",
    "api": NO_ARRAYS,
    "cli": NO_ARRAYS,
    "cli.guard": f"{NO_ARRAYS} pydantic",
    "cli.interrupt": f"{NO_ARRAYS} pydantic typer",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_or_is_in(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each import of a source file, within functions too: a module, and the names that are taken from it."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if type_checking_only(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module), [alias.name for alias in node.names]
        stack += ast.iter_child_nodes(node)


MODULES = {module_of(path): path for path in SOURCES}


def modules_of(path: Path) -> set[str]:
    """The modules that a source file imports; `from lftpipe.flow import solver` names the solver."""
    found = set()
    for module, names in imported(path):
        within = {f"{module}.{name}" for name in names} & MODULES.keys()
        taken = len(within) < len(names) or not names  # something of the module itself
        found |= within | ({module} if taken else set())
    return found


ARROWS = {module: modules_of(path) for module, path in MODULES.items()}


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms.split())


def knows(module: str, places: str) -> set[str]:
    return {name for name in ARROWS[module] for place in places.split() if is_or_is_in(name, place)}


def test_no_two_files_of_tests_have_the_same_name():
    """Pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_file_is_in_a_room():
    rooms = {module.split(".")[1] for module in MODULES if module != "lftpipe"} - {"__main__"}
    assert rooms == set(" ".join(FLOORS).split())


def test_no_room_imports_a_room_of_its_floor_or_above():
    up = {
        f"{module} -> {name}"
        for module, names in ARROWS.items()
        if module not in ("lftpipe", "lftpipe.__main__")
        for name in names
        if name.startswith("lftpipe.") and module.split(".")[1] != name.split(".")[1]
        if floor_of(name) >= floor_of(module)
    }
    assert up == set()


def test_no_file_imports_the_package_itself():
    """It imports them; the version is in `lftpipe.base.version`."""
    assert {module for module, names in ARROWS.items() if "lftpipe" in names} == set()


def test_no_files_import_each_other_in_a_circle():
    left = {module: {name for name in names if name in MODULES} for module, names in ARROWS.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert left == {}


def test_a_room_imports_no_library_that_it_must_not():
    known = {
        f"{module} imports {name}"
        for place, libraries in WITHOUT.items()
        for module in MODULES
        if is_or_is_in(module, f"lftpipe.{place}")
        for name in knows(module, libraries)
    }
    assert known == set()


def test_every_place_without_libraries_exists():
    assert {place for place in WITHOUT if f"lftpipe.{place}" not in MODULES} == set()


def test_a_command_never_imports_a_command():
    """But `compress`, which runs the others as if typed."""
    commands = [module for module in MODULES if module.startswith("lftpipe.commands.")]
    commands.remove("lftpipe.commands.compress")
    assert {module for module in commands if knows(module, "lftpipe.commands")} == set()


def test_training_from_the_cache_knows_no_trunk():
    """`train` from the cache and `evaluate` run single layers; the trunk is for extraction."""
    may = (
        "lftpipe.teacher.trunk",
        "lftpipe.teacher.compare",
        "lftpipe.data.teacher_reader",
        "lftpipe.extraction",
        "lftpipe.commands.extract",
    )
    known = {module for module in MODULES if knows(module, "lftpipe.teacher.trunk")}
    assert {module for module in known if not any(is_or_is_in(module, place) for place in may)} == set()


def test_models_are_loaded_only_where_a_trunk_or_a_student_is():
    """`AutoModel` and its kin: to compare, to convert GGUF files, models on meta, and students."""
    may = ("teacher.compare", "teacher.gguf", "families.meta_model", "student", "commands")
    loading = {
        module
        for module, path in MODULES.items()
        for name, taken in imported(path)
        if name == "transformers" and {"AutoModel", "AutoModelForCausalLM"} & set(taken)
    }
    assert {
        module for module in loading if not any(is_or_is_in(module, f"lftpipe.{place}") for place in may)
    } == set()


def test_importing_has_no_effects():
    """A module's body defines; a bare call at its top level would do. `cli.app` registers commands."""
    effects = []
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            does = isinstance(node, ast.For | ast.While | ast.With) or (
                isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            )
            if does and module != "lftpipe.cli.app" and "register" not in ast.unparse(node):
                effects.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert effects == []


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
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.skipif(
    CHECK_TYPES, reason="beartype knows the classes of the first import, and this one imports afresh"
)
def test_training_from_the_cache_runs_no_teacher(stores, tmp_path):
    """In a process that imports lftpipe afresh, where loading a model in any of transformers' ways fails.

    Models on the meta device say how layers are built: they have no weights.
    """
    store, run, results = str(stores["neox"]), tmp_path / "run", tmp_path / "results.json"
    options = ["--block", "1:3", "--tokens", "64", "--batch-tokens", "64", "--run", str(run)]
    commands = [
        ["train", "--from-cache", *options, "--store", store, "--debug"],
        ["evaluate", str(run), "--store", store, "--out", str(results), "--debug"],
    ]

    def refuse(*arguments, **options):
        raise SystemExit("a model was loaded")

    begin = transformers.PreTrainedModel.__init__

    def on_meta(model, *arguments, **options):
        if torch.get_default_device().type != "meta":
            refuse()
        begin(model, *arguments, **options)

    def act() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "lftpipe"]:
            del sys.modules[name]
        sys.modules["lftpipe.teacher.trunk"] = None  # pyright: ignore[reportArgumentType]  # to import it fails
        transformers.PreTrainedModel.from_pretrained = refuse
        transformers.PreTrainedModel.__init__ = on_meta  # pyright: ignore[reportAttributeAccessIssue]
        for loader in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
            getattr(transformers, loader).from_pretrained = refuse
        app = importlib.import_module("lftpipe.cli.app").app
        for command in commands:
            app(command, standalone_mode=False)

    assert Child(act).join(120) == 0
    assert (run / "flow.safetensors").is_file()
    assert results.is_file()
