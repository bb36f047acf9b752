"""`lftpipe verify`: find every byte of a store that is not as it was written."""

from dataclasses import asdict
from typing import Any

from lftpipe import progress
from lftpipe.config.settings import VerifySettings
from lftpipe.store import verify_store
from lftpipe.store.verify import Report
from lftpipe.workspace import find_store


def verify(settings: VerifySettings) -> dict[str, Any]:
    """Compare a store with its manifest.

    Returns
    -------
    dict
        `ok`, the `damaged` files with array, split and shard, and `failed`: the error, if it is not `ok`.

    Raises
    ------
    LftpipeError
        If there is no such store, or it is incomplete.
    """
    found = verify_store(find_store(settings.workspace, settings.target or settings.store))
    return {
        "store": str(found.path),
        "ok": found.ok,
        "failed": "" if found.ok else _error(found),
        "files": found.files,
        "bytes": found.bytes,
        "damaged": [asdict(damage) | {"message": str(damage)} for damage in found.damaged],
    }


def summary(result: dict[str, Any]) -> str:
    """What was found, and the cure."""
    size = f"{result['files']} files, {progress.human_bytes(result['bytes'])}"
    if result["ok"]:
        return f"{result['store']} is whole: {size}, every byte as it was written"
    lines = [f"{result['store']}: {len(result['damaged'])} of {size} are damaged"]
    return "\n".join(lines + [f"  {damage['message']}" for damage in result["damaged"]])


def _error(found: Report) -> str:
    return (
        f"given: {found.path} with {len(found.damaged)} damaged of {found.files} files / "
        "expected: every byte as it was written / "
        "do: run the `lftpipe extract` command that made it, with --repair: it computes just those again"
    )
