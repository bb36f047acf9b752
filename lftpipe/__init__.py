"""lftpipe: train Latent Flow Transformers from a cache of the teacher's hidden states.

Everything in `__all__` is public; what lies in the rooms below may change. Names are loaded when they are
first used: `import lftpipe` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lftpipe.base.version import __version__

if TYPE_CHECKING:
    from lftpipe.api import (
        add_term,
        compare_runs,
        compress,
        evaluate,
        export,
        extract,
        fuse,
        generate,
        heal,
        info,
        list_runs,
        load_student,
        open_store,
        plan,
        pull,
        push,
        recognise,
        recouple,
        report,
        sweep,
        toy,
        train,
        verify,
    )
    from lftpipe.base.errors import LftpipeError
    from lftpipe.fusion import ByteModel, FusionLogitsProcessor

__all__ = [
    "ByteModel",
    "FusionLogitsProcessor",
    "LftpipeError",
    "__version__",
    "add_term",
    "compare_runs",
    "compress",
    "evaluate",
    "export",
    "extract",
    "fuse",
    "generate",
    "heal",
    "info",
    "list_runs",
    "load_student",
    "open_store",
    "plan",
    "pull",
    "push",
    "recognise",
    "recouple",
    "report",
    "sweep",
    "toy",
    "train",
    "verify",
]


#: Public names that are not of `lftpipe.api`.
_ELSEWHERE = {
    "LftpipeError": "lftpipe.base.errors",
    "ByteModel": "lftpipe.fusion",
    "FusionLogitsProcessor": "lftpipe.fusion",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "lftpipe.api")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
