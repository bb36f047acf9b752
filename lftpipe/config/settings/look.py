"""Settings of `lftpipe info`, `verify`, `runs`, `compare` and `report`, which look at what is there."""

from typing import Annotated, ClassVar

from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import CONFIG, MAIN, File, Names, OfStore, Role, Writing

_FORMER = {
    "seed": "this command draws no random numbers",
    "threads": "this command computes nothing",
    "device": "this command computes nothing",
}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InfoSettings(OfStore):
    """Of `lftpipe info`."""

    target: Annotated[File | None, Role.ARGUMENT] = None
    """A store, or a run by name or folder; default: the workspace's only store."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}
    FORMER: ClassVar[dict[str, str]] = _FORMER | {"force": "this command writes no files"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class VerifySettings(OfStore):
    """Of `lftpipe verify`."""

    target: Annotated[File | None, Role.ARGUMENT] = None
    """The store; default: the workspace's only one."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}
    FORMER: ClassVar[dict[str, str]] = _FORMER | {"force": "this command writes no files"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ReportSettings(OfStore, Writing):
    """Of `lftpipe report`."""

    out: File | None = None
    """The Markdown file; default: `report.md` beside the store."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "out force store workspace"}
    FORMER: ClassVar[dict[str, str]] = _FORMER


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RunsSettings(OfStore):
    """Of `lftpipe runs`."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CompareSettings(OfStore):
    """Of `lftpipe compare`."""

    runs: Names = ()
    """Two runs, by name or path."""

    PANELS: ClassVar[dict[str, str]] = {MAIN: "store workspace"}
