"""Terms of `--loss` from outside lftpipe: added by a call, or by a package's entry point. No torch."""

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lftpipe.errors import SettingsError

#: The group of entry points: a name, and where the function is.
GROUP = "lftpipe.terms"

_NAME = re.compile(r"[a-z][a-z0-9-]*")

#: What this process added.
_ADDED: dict[str, Callable[..., Any]] = {}


def add_term(name: str, function: Callable[..., Any]) -> None:
    """Add a term that `--loss` can name, in this process.

    Parameters
    ----------
    name
        Lower-case letters, digits and hyphens; not that of a term of lftpipe. The same name again replaces
        the function, as a notebook's cell does that is run twice.
    function
        From a `lftpipe.training.terms.Problem` to a scalar tensor.

    Raises
    ------
    SettingsError
        If the name is taken or cannot be written in `--loss`.
    """
    from lftpipe.config.loss import TERMS

    if not _NAME.fullmatch(name) or name in TERMS:
        raise SettingsError(
            f"a term named {name!r}",
            f"lower-case letters, digits and hyphens, and none of {', '.join(TERMS)}",
            "choose another name",
        )
    _ADDED[name] = function


def outside_terms() -> dict[str, Callable[..., Any] | EntryPoint]:
    """By name, what was added here and what installed packages offer; nothing is imported."""
    return {each.name: each for each in entry_points(group=GROUP)} | _ADDED


def load_term(name: str) -> Callable[..., Any]:
    """The function of one of them.

    Parameters
    ----------
    name
        Of the term.

    Raises
    ------
    SettingsError
        If there is none, or its package cannot be imported.
    """
    found = outside_terms().get(name)
    if found is None:
        raise SettingsError(
            f"the term {name!r}, which nothing here computes",
            "a term of lftpipe, of `lftpipe.add_term`, or of an installed package",
            "add it again before you go on with the run",
        )
    if not isinstance(found, EntryPoint):
        return found
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"the term {name!r} of {found.value} ({error})",
            "a function that can be imported",
            "correct the package",
        ) from error
