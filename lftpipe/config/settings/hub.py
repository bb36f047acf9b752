"""Settings of `lftpipe push` and `lftpipe pull`."""

from typing import Annotated, ClassVar

from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import CONFIG, MAIN, Common, OfStore, Role, Text


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PushSettings(OfStore):
    """Of `lftpipe push`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """A store, a run by name or folder, or an exported folder."""
    repository: Annotated[Text | None, Role.ARGUMENT] = None
    """The repository, ORG/NAME: of data sets for a store, of models for the rest."""
    private: bool = False
    """Make a new repository private."""
    license: Text | None = None
    """The licence that the card names, such as apache-2.0; default: none is named."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "private license store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PullSettings(Common):
    """Of `lftpipe pull`."""

    source: Annotated[Text | None, Role.ARGUMENT] = None
    """`hf://ORG/NAME` for a run, `hf://datasets/ORG/NAME` for a store."""
    revision: Text | None = None
    """Branch, tag or commit; default: the repository's default branch."""
    run: Text | None = None
    """Name of the run; default: the repository's."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "revision run workspace"}
