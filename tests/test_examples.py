"""The notebooks of `examples/`: each runs from top to bottom in an empty folder, and carries no outputs."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))

#: A notebook's last expression of a cell is shown; so it is here.
SHOWN = """
def _show(value):
    html = getattr(value, "_repr_html_", None)
    print((html and html()) or repr(value))
"""


def cells(path: Path, kind: str) -> list[str]:
    notebook: dict[str, Any] = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def script(path: Path) -> str:
    """The code of all cells, with what each would show."""
    parts = [SHOWN]
    for source in cells(path, "code"):
        tree = ast.parse(source)
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            call = ast.Call(ast.Name("_show", ast.Load()), [last.value], [])
            tree.body[-1] = ast.copy_location(ast.Expr(call), last)
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
    return "\n".join(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all notebooks: the first that needs a store makes it."""
    return tmp_path_factory.mktemp("examples")


def test_there_are_four() -> None:
    assert [path.name[:2] for path in EXAMPLES] == ["1-", "2-", "3-", "4-"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_carries_no_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path: Path) -> None:
    """A name that has moved is noticed here, without running the notebook."""
    for source in cells(path, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_a_batch_by_hand_takes_forty_lines() -> None:
    lines = [line for source in cells(EXAMPLES[0], "code") for line in source.splitlines()]
    walk = lines[: lines.index("torch.set_grad_enabled(True)")]
    assert sum(bool(line.strip()) and not line.startswith(("import", "from")) for line in walk) <= 40


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_runs_in_an_empty_folder(path: Path, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LFTPIPE_WORKSPACE"}
    environment |= {"MPLBACKEND": "agg", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    if path.stem.startswith(("3", "4")):
        assert "<th>KL</th>" in done.stdout  # the table of `evaluate`, as a notebook shows it
