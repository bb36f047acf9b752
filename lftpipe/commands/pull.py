"""`lftpipe pull`: a store or a run from the Hugging Face Hub into the workspace, checked."""

import shutil
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.errors import LftpipeError, RunError, SettingsError, StoreError
from lftpipe.base.outputs import one_writer, refuse_name
from lftpipe.base.workspace import STORE_NAME, next_command
from lftpipe.config.settings import PullSettings
from lftpipe.results.outcomes import Pulled
from lftpipe.results.run import SAMPLES
from lftpipe.storage.hub import Repository
from lftpipe.store import Store, verify_store

_OF_A_RUN = (runs.SETTINGS, runs.METRICS, runs.WEIGHTS, SAMPLES, runs.MANIFEST)


def pull(settings: PullSettings) -> Pulled:
    """Download into a hidden folder of the workspace, check, and put it in its place.

    Raises `LftpipeError` if the repository holds neither, what came is damaged, or another one lies in its
    place.
    """
    if settings.source is None:
        raise SettingsError("pull", "from where", "type lftpipe pull hf://ORG/NAME")
    repository = Repository.of_url(settings.source)
    names = repository.files(settings.revision)
    kind = _kind(repository, names)
    staging = settings.workspace / f".pull-{repository.kind}-{repository.name.replace('/', '--')}"
    with one_writer(staging):
        only = [f"{STORE_NAME}/*"] if kind == "store" else list(_OF_A_RUN)
        with progress.task(f"pull {repository.url}", 1, "repositories") as task:
            repository.download(staging, only=only, revision=settings.revision)
            task.advance(1)
        placed = _place_store if kind == "store" else _place_run
        result = placed(staging, settings, repository)
        shutil.rmtree(staging)
    return result


def _kind(repository: Repository, names: list[str]) -> str:
    if repository.kind == "dataset" and f"{STORE_NAME}/manifest.json" in names:
        return "store"
    if repository.kind == "model" and {runs.MANIFEST, runs.WEIGHTS} <= set(names):
        return "run"
    if "config.json" in names:
        raise RunError(
            f"{repository.url}, a model of transformers",
            "a run of lftpipe",
            "load it with AutoModelForCausalLM.from_pretrained, or `lftpipe generate` its folder",
        )
    raise StoreError(
        f"{repository.url}, which holds no {STORE_NAME} and no run",
        "what `lftpipe push` uploads",
        "check the name; a store is at hf://datasets/ORG/NAME",
    )


def _place_store(staging: Path, settings: PullSettings, repository: Repository) -> Pulled:
    here = staging / STORE_NAME
    report = verify_store(here)
    if not report.ok:
        shutil.rmtree(staging)  # or the client would take what is there for what it has brought
        raise StoreError(
            f"{repository.url}: {report.damaged[0]}",
            "the bytes that were pushed",
            "pull again; if it stays, push it again",
        )
    store = Store.open(here)
    fingerprint, teacher = store.fingerprint, str(store.identity["teacher"]["name"])
    refuse_name(teacher, "teacher")
    out = settings.workspace / teacher / STORE_NAME
    there = out.exists()
    if there and Store.open(out).fingerprint != fingerprint:
        raise _occupied(out, "--workspace DIR")
    if not there:
        out.parent.mkdir(parents=True, exist_ok=True)
        here.rename(out)
    return Pulled(kind="store", source=repository.url, path=str(out), teacher=teacher, already_there=there)


def _place_run(staging: Path, settings: PullSettings, repository: Repository) -> Pulled:
    try:
        run = runs.open_run(staging)
    except LftpipeError as error:
        shutil.rmtree(staging)
        raise RunError(
            f"{repository.url}: {error.given}", "the files that were pushed", "pull again"
        ) from error
    identity: Any = run.teacher
    teacher = str(identity.get("name") or Path(identity["model"]).name)
    name = settings.run or repository.name.rpartition("/")[2]
    for given, what in ((teacher, "teacher"), (name, "run")):
        refuse_name(given, what)
    out = settings.workspace / teacher / "runs" / name
    there = out.exists()
    if there and runs.open_run(out).weights_digest != run.weights_digest:
        raise _occupied(out, "--run NAME")
    if not there:
        out.mkdir(parents=True)
        for file in _OF_A_RUN:  # the manifest last: it says that the run is finished
            if (staging / file).is_file():
                (staging / file).rename(out / file)
    return Pulled(kind="run", source=repository.url, path=str(out), teacher=teacher, already_there=there)


def _occupied(out: Path, option: str) -> LftpipeError:
    return SettingsError(f"{out}, which is another one", "a free place", f"pass {option}")


def summary(result: Pulled) -> str:
    """Where it is, and what to type next."""
    told = "is there already" if result.already_there else "is whole"
    lines = [f"{result.path}: {result.kind} of {result.teacher} from {result.source}, {told}"]
    if result.kind == "store":
        lines.append(next_command("train", "--from-cache", "--store", result.path))
    else:
        lines.append(next_command("generate", result.path, "--prompt", "TEXT"))
    return "\n".join(lines)
