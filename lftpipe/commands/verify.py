"""`lftpipe verify`: find every byte of a store that is not as it was written."""

from dataclasses import asdict

from lftpipe.base import progress
from lftpipe.base.workspace import find_store
from lftpipe.config.settings import VerifySettings
from lftpipe.results.facts import DamagedFile, Verification
from lftpipe.store import verify_store
from lftpipe.store.verify import Report


def verify(settings: VerifySettings) -> Verification:
    """Compare a store with its manifest.

    Raises `LftpipeError` if there is no such store, or it is incomplete.

    Returns
    -------
    Verification
        The damaged files with array, split and shard, and the error, if there are any.
    """
    found = verify_store(find_store(settings.workspace, settings.target or settings.store))
    return Verification(
        store=str(found.path),
        ok=found.ok,
        failed="" if found.ok else _error(found),
        files=found.files,
        bytes=found.bytes,
        absent_shards=found.absent,
        damaged=[DamagedFile(**asdict(damage), message=str(damage)) for damage in found.damaged],
    )


def summary(result: Verification) -> str:
    """What was found, and the cure."""
    size = f"{result.files} files, {progress.human_bytes(result.bytes)}"
    if result.ok and result.absent_shards is not None:
        absent = (
            f"{result.absent_shards} training shards are not there now: runs get them when they need them"
        )
        return f"{result.store} rolls: {size}, every byte as it was written\n  {absent}"
    if result.ok:
        return f"{result.store} is whole: {size}, every byte as it was written"
    lines = [f"{result.store}: {len(result.damaged)} of {size} are damaged"]
    return "\n".join(lines + [f"  {damage.message}" for damage in result.damaged])


def _error(found: Report) -> str:
    return (
        f"given: {found.path} with {len(found.damaged)} damaged of {found.files} files / "
        "expected: every byte as it was written / "
        "do: run the `lftpipe extract` command that made it, with --repair: it computes just those again"
    )
