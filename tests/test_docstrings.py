"""Every public function says what each of its parameters means (numpydoc's sections), room by room."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lftpipe").with_suffix("").parts[0]


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Public functions, and methods of public classes, that somebody may call."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def parameters(function: Function) -> list[str]:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def documented(function: Function) -> list[str]:
    """The names in the section Parameters, which may share a line."""
    text = ast.get_docstring(function) or ""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", text, re.M | re.S)
    heads = re.findall(r"^(\S.*)$", section[1], re.M) if section else []
    return [name.strip() for head in heads for name in head.split(" : ")[0].split(",")]


def gaps(path: Path) -> list[str]:
    found = []
    for name, function in functions(path):
        # An override's parameters are documented where it is declared.
        marks = [ast.unparse(each) for each in function.decorator_list]
        elsewhere = any(name in mark for mark in marks for name in ("overload", "override"))
        if not elsewhere and sorted(documented(function)) != sorted(parameters(function)):
            missing = sorted(set(parameters(function)) - set(documented(function)))
            extra = sorted(set(documented(function)) - set(parameters(function)))
            found.append(
                f"{path.relative_to(ROOT)}:{function.lineno} {name}: missing {missing}, unknown {extra}"
            )
    return found


@pytest.mark.parametrize("room", sorted({room_of(path) for path in (ROOT / "lftpipe").rglob("*.py")}))
def test_every_parameter_is_documented(room):
    paths = [path for path in (ROOT / "lftpipe").rglob("*.py") if room_of(path) == room]
    assert [gap for path in sorted(paths) for gap in gaps(path)] == []
