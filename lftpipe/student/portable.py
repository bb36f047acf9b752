"""A student's classes as one file of Python: transformers loads an export where lftpipe is not installed.

The file is made of the very modules that lftpipe runs, in the order of their imports: their own imports of
lftpipe are left out, and jaxtyping's shapes become plain tensors. Nobody writes it, so it cannot drift.
"""

import ast
from collections.abc import Iterator
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

import lftpipe

#: The module of the file, as `auto_map` names it.
MODULE = "modeling_latent_flow"

#: Where the classes are.
ROOT = "lftpipe.student.model"

#: Stands in for jaxtyping: a shape is an annotation, of which the tensor's type is left.
SHAPES = '''
class _Shape:
    """`Float[Tensor, "position feature"]` is a Tensor."""

    def __class_getitem__(cls, item):
        return item[0]


Bool = Float = Int = Int32 = Shaped = _Shape
'''


def modelling_file(root: str = ROOT) -> str:
    """The source of the file.

    Parameters
    ----------
    root
        The module whose classes are wanted.

    Raises
    ------
    ValueError
        If two modules have the same name at their top level, or one imports lftpipe in a way that cannot be
        left out.
    """
    imports: dict[str, None] = {}
    bodies: list[str] = []
    owners: dict[str, str] = {}
    for module in _in_order(root):
        tree = ast.parse(_source(module))
        kept: list[ast.stmt] = []
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not _is_left_out(node, module):
                    imports[ast.unparse(node)] = None
            elif not (_is_docstring(node) or _is_type_checking(node)):
                kept.append(node)
        for name in _names(kept):
            if owners.setdefault(name, module) != module:
                raise ValueError(f"{name} is in {owners[name]} and in {module}")
        bodies.append(f"# --- {module}\n\n" + "\n\n".join(ast.unparse(node) for node in kept))
    head = (
        f'"""Latent Flow Transformer students (arXiv 2505.14513), made by lftpipe {lftpipe.__version__}.\n\n'
        "Needs torch and transformers alone. Apache-2.0; https://arxiv.org/abs/2505.14513 has the method.\n"
        '"""'
    )
    return "\n\n".join([head, "\n".join(imports), SHAPES.strip(), *bodies]) + "\n"


def auto_map(model: Any) -> dict[str, str]:
    """What `config.json` says of where the classes of a model are.

    Parameters
    ----------
    model
        A student as a language model.
    """
    config, causal = type(model.config).__name__, type(model).__name__
    return {"AutoConfig": f"{MODULE}.{config}", "AutoModelForCausalLM": f"{MODULE}.{causal}"}


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    return (resources.files(package) / str(PurePosixPath(f"{name}.py"))).read_text("utf-8")


def _in_order(module: str, seen: dict[str, None] | None = None) -> list[str]:
    """The modules of lftpipe that a module needs when it is imported, each after those it needs itself."""
    seen = {} if seen is None else seen
    if module not in seen:
        for node in ast.parse(_source(module)).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lftpipe."):
                _in_order(str(node.module), seen)
        seen[module] = None
    return list(seen)


def _is_left_out(node: ast.Import | ast.ImportFrom, module: str) -> bool:
    if isinstance(node, ast.ImportFrom):
        if node.module == "jaxtyping":
            return True
        if str(node.module).startswith("lftpipe"):
            if node.module == "lftpipe" or any(alias.asname for alias in node.names):
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
