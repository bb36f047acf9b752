"""Who may know whom: the import table of the package, read from its sources."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lftpipe").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Modules that a source file names, all of them or only those outside functions."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
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


#: Room, and what it must not know.
MUST_NOT_KNOW = {
    "lftpipe.store": ("torch", "transformers", "lftpipe.teacher", "lftpipe.flow", "lftpipe.stages"),
    "lftpipe.flow": (
        *("transformers", "safetensors", "zarr", "pathlib", "json", "os", "lftpipe.store", "lftpipe.stages"),
        *(
            "lftpipe.teacher.source",
            "lftpipe.teacher.parts",
            "lftpipe.teacher.trunk",
            "lftpipe.teacher.checkpoint",
        ),
    ),
    "lftpipe.teacher": ("zarr", "lftpipe.store", "lftpipe.flow", "lftpipe.stages", "lftpipe.training"),
    "lftpipe.teacher.family": ("transformers", "pathlib"),
    "lftpipe.corpus": ("torch", "transformers", "lftpipe.teacher", "lftpipe.store", "lftpipe.packing"),
    "lftpipe.packing": ("torch", "transformers", "lftpipe.teacher", "lftpipe.store"),
    "lftpipe.settings": ("torch", "transformers", "numpy", "zarr"),
    "lftpipe.recipe": ("torch", "transformers", "numpy", "zarr"),
    "lftpipe.errors": ("torch", "lftpipe"),
    "lftpipe.manifest": ("torch", "transformers", "zarr", "lftpipe"),
    "lftpipe.loss": ("torch", "transformers", "numpy", "zarr"),
    "lftpipe.spans": ("torch", "transformers", "numpy", "zarr"),
    "lftpipe.compute": ("transformers", "zarr", "lftpipe"),
    "lftpipe.device": ("transformers", "zarr", "lftpipe.store", "lftpipe.teacher", "lftpipe.stages"),
    "lftpipe.assignment": ("torch", "transformers", "zarr", "lftpipe"),
    "lftpipe.coupling": ("torch", "transformers", "lftpipe.store", "lftpipe.teacher", "lftpipe.flow"),
    "lftpipe.metrics": ("transformers", "zarr", "lftpipe.store", "lftpipe.teacher", "lftpipe.flow"),
    "lftpipe.correlation": ("torch", "transformers", "zarr", "lftpipe"),
    "lftpipe.probe": ("transformers", "zarr", "lftpipe.teacher.source", "lftpipe.training", "lftpipe.stages"),
    "lftpipe.rows": ("transformers", "zarr", "lftpipe.store", "lftpipe.training", "lftpipe.stages"),
    "lftpipe.scoring": (
        "transformers",
        "zarr",
        "lftpipe.teacher.trunk",
        "lftpipe.training",
        "lftpipe.stages",
    ),
    "lftpipe.sweep_page": (
        "torch",
        "transformers",
        "zarr",
        "lftpipe.store",
        "lftpipe.teacher",
        "lftpipe.stages",
    ),
    "lftpipe.training": ("transformers", "zarr", "lftpipe.teacher.trunk", "lftpipe.stages"),
    "lftpipe.student": (
        "zarr",
        "lftpipe.store",
        "lftpipe.stages",
        "lftpipe.training",
        "lftpipe.teacher.trunk",
    ),
    "lftpipe.stages.train": ("transformers", "lftpipe.teacher.trunk"),
    "lftpipe.stages.evaluate": ("transformers", "lftpipe.teacher.trunk"),
    "lftpipe.stages.recouple": ("transformers", "lftpipe.teacher", "lftpipe.training"),
    "lftpipe.stages.sweep": ("transformers", "lftpipe.teacher.trunk"),
    "lftpipe.stages.report": ("torch", "transformers", "lftpipe.teacher", "lftpipe.flow"),
}


@pytest.mark.parametrize("room", MUST_NOT_KNOW)
def test_a_room_does_not_know(room):
    files = [path for path in SOURCES if module_of(path) == room or module_of(path).startswith(room + ".")]
    assert files, f"there is no {room}"
    for path in files:
        assert knows(path, MUST_NOT_KNOW[room]) == set(), path


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nobody_imports_the_command_line(path):
    assert knows(path, ("lftpipe.cli",)) == set() or path.name == "__main__.py"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_models_are_loaded_only_where_a_trunk_is(path):
    """`AutoModel` and its kin: the trunk, the conversion of GGUF files, and students."""
    allowed = {"lftpipe.teacher.trunk", "lftpipe.teacher.source"}
    if module_of(path) not in allowed and not module_of(path).startswith(
        ("lftpipe.student", "lftpipe.stages.")
    ):
        assert knows(path, ("transformers.AutoModel", "transformers.AutoModelForCausalLM")) == set()


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_importing_has_no_effects(path):
    """A module's body defines; a bare call at its top level would do."""
    allowed = {"lftpipe.cli"}  # registers its commands
    if module_of(path) in allowed:
        return
    for node in ast.parse(path.read_text()).body:
        effects = isinstance(node, ast.For | ast.While | ast.With) or (
            isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        )
        assert not effects or "register" in ast.unparse(node), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_module_is_called_utils_and_none_is_endless():
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]
    lengths = {module_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 330} == {}


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
from lftpipe.cli import app
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
    assert (run / "flow.safetensors").is_file() and results.is_file()
