"""Where things lie: `<workspace>/<teacher>/states.zarr`, `runs/<name>/` and the files beside them."""

import shlex
from pathlib import Path

from lftpipe.base.errors import RunError, SettingsError, StoreError
from lftpipe.base.outputs import refuse_name

STORE_NAME = "states.zarr"


def next_command(*words: str | Path) -> str:
    """The line that says what to type next: names with spaces or brackets are quoted for the shell."""
    return f"next: {shlex.join(['lftpipe', *map(str, words)])}"


def find_store(workspace: Path, store: Path | None) -> Path:
    """The store that was named, or the only one in the workspace.

    Raises `StoreError` if there is none, or more than one and none was named.
    """
    if store is not None:
        if not store.is_dir():
            raise StoreError(f"store {store}", "an existing store", "make it with `lftpipe extract`")
        return store
    found = sorted(workspace.glob(f"*/{STORE_NAME}"))
    if not found:
        raise StoreError(
            f"workspace {workspace} without a store",
            f"<teacher>/{STORE_NAME} in it",
            "make one with `lftpipe extract`, or name one with --store",
        )
    if len(found) > 1:
        raise StoreError(
            f"{len(found)} stores in {workspace}: {', '.join(map(str, found))}",
            "one of them",
            "name it with --store",
        )
    return found[0]


def run_path(store: Path, name: str) -> Path:
    """The folder of a run called `name`, which may also be a path."""
    if "/" in name:
        return Path(name)
    refuse_name(name, "run")
    return store.parent / "runs" / name


def require_json_name(out: Path) -> None:
    """Refuse a JSON file whose name says otherwise."""
    if out.suffix != ".json":
        raise SettingsError(
            f"--out {out}", "the JSON file's name", "end it in .json; the rest goes beside it"
        )


def find_run(workspace: Path, store: Path | None, name: str) -> Path:
    """The folder of a run: by its path, or by its name beside the store or anywhere in the workspace.

    Raises `RunError` if there is none of that name, or more than one.
    """
    path = Path(name)
    if "/" in name or (path / "manifest.json").is_file():
        return path if path.name else path.resolve()  # `.` has a name, too
    if store is not None:
        return run_path(store, name)
    found = sorted(path for path in workspace.glob("*/runs/*") if path.name == name)
    if not found and path.is_dir():
        return path
    if not found:
        there = sorted(path.parent.name for path in workspace.glob("*/runs/*/manifest.json"))
        raise RunError(
            f"no run {name} in {workspace}",
            f"a run's name or path; finished are {', '.join(there) or 'none'}",
            "name one, or train it with `lftpipe train`",
        )
    if len(found) > 1:
        raise RunError(
            f"{len(found)} runs named {name}: {', '.join(map(str, found))}", "one of them", "pass its path"
        )
    return found[0]


def find_runs(store: Path, names: tuple[str, ...]) -> list[Path]:
    """The named runs, or every finished one beside the store.

    `names`: names or paths of runs; none means every finished one.
    Raises `RunError` if a named run does not exist or is unfinished, or there is none at all.
    """
    if names:
        runs = [run_path(store, name) for name in names]
    else:
        runs = sorted(path.parent for path in store.parent.glob("runs/*/manifest.json"))
    for run in runs:
        if not (run / "manifest.json").is_file():
            command = command_of(run)
            raise RunError(
                f"{'unfinished' if command else 'missing'} run {run}",
                "a finished run with manifest.json",
                f"{command or 'train'} it with `lftpipe {command or 'train'} --resume`",
            )
    if not runs:
        raise RunError(
            f"no finished run in {store.parent / 'runs'}",
            "at least one",
            "make one with `lftpipe train --from-cache`",
        )
    return runs


def command_of(run: Path) -> str | None:
    """The command that began a run, `train` or `heal`; None where nothing was begun."""
    settings = run / "settings.toml"
    if not settings.is_file():
        return None
    return "heal" if b"[heal]" in settings.read_bytes().splitlines() else "train"
