"""A student's classes as one file of Python: transformers loads an export where lftpipe is not installed.

The file is made of the very modules that lftpipe runs, in the order of their imports: their own imports of
lftpipe are left out, and jaxtyping's shapes become plain tensors. Nobody writes it, so it cannot drift.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lftpipe.base.version import __version__
from lftpipe.student.config import PREFIX

#: The module of the file, as `auto_map` names it.
MODULE = "modeling_latent_flow"

HEAD = '''"""Latent Flow Transformer students (arXiv 2505.14513), made by lftpipe {version}.

Needs torch and transformers alone. Apache-2.0; https://arxiv.org/abs/2505.14513 has the method.
"""'''

#: Stands in for jaxtyping: a shape is an annotation, of which the tensor's type is left.
SHAPES = '''
class _Shape:
    """`Float[Tensor, "position feature"]` is a Tensor."""

    def __class_getitem__(cls, item):
        return item[0]


Bool = Float = Int = Int32 = Shaped = _Shape
'''


def modelling_file(model: Any) -> str:
    """The source of the file that has a student's classes.

    Raises `ValueError` if two modules have the same name at their top level, or one imports lftpipe in a way
    that cannot be left out.
    """
    root = next(kind.__module__ for kind in type(model).__mro__ if kind.__module__.startswith("lftpipe."))
    parts = [HEAD.format(version=__version__), *bundle(root)]
    config, causal = type(model.config), type(model)
    if causal.__name__ not in parts[-1]:  # its classes are made when they are needed
        kind = config.model_type.removeprefix(PREFIX)
        parts.append(f"{causal.__name__} = student_class({kind!r})")
        parts.append(f"{config.__name__} = {causal.__name__}.config_class")
    return "\n\n".join(parts) + "\n"


def bundle(root: str) -> list[str]:
    """The source of a module and what it needs of lftpipe: imports, then each module, the root last."""
    imports: dict[str, None] = {"from types import SimpleNamespace": None}
    bodies: list[str] = []
    owners: dict[str, str] = {}
    as_modules = _imported_as_modules(root)
    for module in _in_order(root):
        statements: list[ast.stmt] = []
        for node in ast.parse(_source(module)).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not _is_left_out(node, module):
                    imports[ast.unparse(node)] = None
            elif not (_is_docstring(node) or _is_type_checking(node)):
                statements.append(node)
        names = list(_names(statements))
        body = [ast.unparse(node) for node in statements]
        if module in as_modules:
            alias = module.rpartition(".")[2]
            body.append(f"{alias} = SimpleNamespace({', '.join(f'{name}={name}' for name in names)})")
            names.append(alias)
        for name in names:
            if owners.setdefault(name, module) != module:
                raise ValueError(f"{name} is in {owners[name]} and in {module}")
        bodies.append(f"# --- {module}\n\n" + "\n\n".join(body))
    return ["\n".join(imports), SHAPES.strip(), *bodies]


def auto_map(model: Any) -> dict[str, str]:
    """What `config.json` says of where the classes of a model are."""
    config, causal = type(model.config).__name__, type(model).__name__
    return {"AutoConfig": f"{MODULE}.{config}", "AutoModelForCausalLM": f"{MODULE}.{causal}"}


def _file(module: str) -> Path:
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")


def _needed(module: str) -> Iterator[tuple[str, bool]]:
    """The modules of lftpipe that a module names at its top level, and whether it imports them as modules."""
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lftpipe"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            if all(_file(name).is_file() for name in inner):
                yield from ((name, True) for name in inner)
            else:
                yield str(node.module), False


def _imported_as_modules(root: str) -> set[str]:
    """Modules that others name with a dot behind: `from lftpipe.teacher import skeleton`."""
    return {name for module in _in_order(root) for name, whole in _needed(module) if whole}


def _source(module: str) -> str:
    return _file(module).read_text("utf-8")


def _in_order(module: str, seen: dict[str, None] | None = None) -> list[str]:
    """The modules of lftpipe that a module needs when it is imported, each after those it needs itself."""
    seen = {} if seen is None else seen
    if module not in seen:
        for name, _ in _needed(module):
            _in_order(name, seen)
        seen[module] = None
    return list(seen)


def _is_left_out(node: ast.Import | ast.ImportFrom, module: str) -> bool:
    if isinstance(node, ast.ImportFrom):
        if node.module == "jaxtyping":
            return True
        if str(node.module).startswith("lftpipe"):
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{module}: {ast.unparse(node)} cannot be left out")
            return True
        return False
    if any(alias.name.startswith("lftpipe") for alias in node.names):
        raise ValueError(f"{module}: {ast.unparse(node)} cannot be left out")
    return False


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _names(nodes: list[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
