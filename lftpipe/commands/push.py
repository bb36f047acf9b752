"""`lftpipe push`: a store, a run or an exported student to a repository of the Hugging Face Hub."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.base.workspace import STORE_NAME, find_run
from lftpipe.config.settings import PushSettings
from lftpipe.corpus.packing import SPLITS
from lftpipe.reporting.cards import run_card, store_card
from lftpipe.results.outcomes import Pushed
from lftpipe.results.run import SAMPLES, SOURCE, ExportSource
from lftpipe.storage.hub import Repository, require_token
from lftpipe.store import Store

#: Files of a run that are uploaded: what makes it, and what it says of itself.
OF_A_RUN = (runs.MANIFEST, runs.SETTINGS, runs.METRICS, runs.WEIGHTS, SAMPLES)

#: Files of a store: Zarr's, and the manifest.
OF_A_STORE = ("zarr.json", "manifest.json", "train/*", "validation/*")


def push(settings: PushSettings) -> Pushed:
    """Upload, with a card.

    Raises `LftpipeError` if there is no such store or run, it is unfinished or damaged, or the Hub refuses.
    """
    if settings.target is None or settings.repository is None:
        raise SettingsError("push", "what and where to", "type lftpipe push STORE ORG/NAME, or RUN ORG/NAME")
    require_token()
    path = Path(settings.target)
    if (path / "zarr.json").is_file():
        store = Store.open(path)
        store.need_whole("push")
        return _push_store(store, settings, settings.repository)
    repository = Repository(settings.repository, "model")
    if (path / SOURCE).is_file():
        names = ExportSource.of_folder(path).files or ["*"]
        return _sent("student", path, names, repository, None, settings.private)
    run = runs.open_run(find_run(settings.workspace, settings.store, settings.target))
    card = run_card(run, repository.url, licence=settings.license)
    return _sent("run", run.path, OF_A_RUN, repository, card, settings.private)


def _push_store(store: Store, settings: PushSettings, name: str) -> Pushed:
    repository = Repository(name, "dataset")
    facts = {
        "layers": store.layers,
        "attention_layers": store.attention_layers,
        "context": store.context,
        "width": store.width,
        "dtype": store.dtype,
        "tokens": {split: store.num_sequences(split) * store.context for split in SPLITS},
        "fingerprint": store.fingerprint,
    }
    card = store_card(facts, store.identity, repository.url, licence=settings.license)
    return _sent("store", store.path, OF_A_STORE, repository, card, settings.private, under=STORE_NAME)


def _sent(
    kind: str,
    folder: Path,
    only: Any,
    repository: Repository,
    card: str | None,
    private: bool,
    under: str = "",
) -> Pushed:
    inside = [path for path in folder.rglob("*") if path.is_file()]
    # As the Hub matches them: a star crosses folders.
    files = [path for path in inside if any(fnmatch(str(path.relative_to(folder)), each) for each in only)]
    with progress.task(f"push {folder.name} to {repository.url}", 1, "repositories") as task:
        web = repository.upload(folder, under=under, card=card, only=list(only), private=private)
        task.advance(1)
    sizes = sum(path.stat().st_size for path in files)
    return Pushed(kind=kind, path=str(folder), url=repository.url, web=web, bytes=sizes)


def summary(result: Pushed) -> str:
    """What went where, and how to get it back."""
    lines = [f"{result.path}: {progress.human_bytes(result.bytes)} uploaded to {result.web}"]
    if result.kind != "student":
        lines.append(f"next, on another machine: lftpipe pull {result.url}")
    return "\n".join(lines)
