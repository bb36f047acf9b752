"""Commands on URLs: what is small is copied here before, and copied back while the command runs and after it.

So that every stage works on a folder. A store's shards never come along: see `lftpipe.storage.places`.
"""

import contextlib
import dataclasses
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lftpipe.base.errors import LftpipeError, StoreError
from lftpipe.storage.bucket import BucketStorage, connect
from lftpipe.storage.places import CACHE_BYTES, MARKER, mirror_of, read_marker, url_of, write_marker

#: Seconds between two copies of what changed.
EVERY_SECONDS = 30.0
_PASSING = (".partial", ".lock", ".tmp")

S = TypeVar("S")


class Mirror:
    """A folder of this machine and a URL, but for the stores below them.

    `stores`: names of folders that are stores, beside those that end in `.zarr`.
    """

    def __init__(self, url: str, folder: Path, stores: set[str]) -> None:
        storage = connect(url)
        self.url, self.folder, self._stores = url, folder, stores
        self._storage = storage if isinstance(storage, BucketStorage) else None
        self._busy = threading.Lock()

    def pull(self) -> None:
        """Bring here what changed there."""
        if self._storage is None:  # the Hub: its stores are read, nothing lies beside them
            return
        with self._known() as known:
            there = dict(self._there(None))
            for name, etag in there.items():
                here, mine = self._signature(name), known.get(name)
                if mine and mine[1] == etag and here:
                    continue
                if here and (mine is None or here != mine[0]):
                    if (self.folder / name).read_bytes() != self._storage.read(name):
                        raise StoreError(
                            f"{name}, which changed in {self.url} and in {self.folder}",
                            "changes in one of them",
                            "delete the one that you do not want",
                        )
                else:
                    self._fetch(name)
                known[name] = [self._signature(name), etag]
            for name in known.keys() - there.keys():
                if self._signature(name) == known[name][0]:
                    (self.folder / name).unlink(missing_ok=True)
                del known[name]

    def push(self) -> None:
        """Bring there what changed here; manifests last, as they say that the rest is whole."""
        if self._storage is None:
            return
        with self._known() as known:
            names = sorted(self._here(), key=lambda name: (name.endswith("manifest.json"), name))
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # it was passing
                    here = self._signature(name)
                    if here and (name not in known or known[name][0] != here):
                        known[name] = [here, self._storage.put(name, (self.folder / name).read_bytes())]
            for name in known.keys() - set(names):
                self._storage.delete(name)
                del known[name]

    @contextlib.contextmanager
    def _known(self) -> Iterator[dict[str, Any]]:
        """What both held when they were last compared; one process at a time."""
        lock = os.open(self.folder.parent / f"{self.folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        with self._busy:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                about = read_marker(self.folder) or {"url": self.url, "files": {}}
                try:
                    yield about["files"]
                finally:
                    write_marker(self.folder, about)
            finally:
                os.close(lock)

    def _is_store(self, name: str) -> bool:
        return name.endswith(".zarr") or name in self._stores

    def _there(self, prefix: str | None) -> Iterator[tuple[str, str]]:
        """Files at the URL and their tags; of stores, a folder is made here."""
        assert self._storage is not None
        folders, files = self._storage.folder(prefix)
        yield from files.items()
        for name in folders:
            if self._is_store(name.rpartition("/")[2]):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            else:
                yield from self._there(name)

    def _here(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not self._is_store(name))
            for name in files:
                if name != MARKER and not name.endswith(_PASSING):
                    yield (Path(folder) / name).relative_to(self.folder).as_posix()

    def _signature(self, name: str) -> list[int] | None:
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def _fetch(self, name: str) -> None:
        assert self._storage is not None
        target = self.folder / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{self.url}/{name}", "names within it", "rename that object")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_bytes(self._storage.read(name))
        partial.replace(target)


def run(stage: Callable[[S], Any], settings: S) -> Any:
    """Call a stage; paths among its settings may be URLs.

    Returns the result, with URLs where the stage spoke of their mirrors.
    """
    if not _urls(settings):
        return stage(settings)
    mirrors: list[Mirror] = []
    told: dict[str, str] = {}
    try:
        here = _localised(settings, mirrors, told)
        for mirror in mirrors:
            mirror.pull()
        with contextlib.ExitStack() as stack:
            for mirror in mirrors:
                stack.enter_context(_pushing(mirror))
            result = stage(here)
    except LftpipeError as error:
        for part in ("given", "expected", "do"):
            setattr(error, part, _renamed(getattr(error, part), told))
        error.args = (f"given: {error.given} / expected: {error.expected} / do: {error.do}",)
        raise
    return _renamed(result, told)


@contextlib.contextmanager
def _pushing(mirror: Mirror) -> Iterator[None]:
    """Push now and then, and at the end, however it comes."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(EVERY_SECONDS):
            with contextlib.suppress(LftpipeError):  # the last push will say it
                mirror.push()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        mirror.push()


def _urls(settings: Any) -> dict[str, Any]:
    """Fields that are URLs, or that have some in them."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        name: value
        for name, value in fields.items()
        if (isinstance(value, Path) and url_of(value))
        or (isinstance(value, tuple) and any(isinstance(each, str) and url_of(each) for each in value))
    }


def _localised(settings: S, mirrors: list[Mirror], told: dict[str, str]) -> S:
    """The settings with folders of this machine in place of URLs."""
    cache = getattr(settings, "cache", None)
    kept = getattr(settings, "cache_bytes", None) or CACHE_BYTES
    found = _urls(settings)

    def local(given: Path | str, *, whole: bool = False, store: bool = False) -> Path:
        url = url_of(given)
        assert url is not None
        for mirror in mirrors:
            if f"{url}/".startswith(f"{mirror.url}/"):
                return mirror.folder / url[len(mirror.url) :].lstrip("/")
        root = url if whole else url.rpartition("/")[0]
        folder = mirror_of(root, cache, kept)
        told[str(folder)] = root
        mirrors.append(Mirror(root, folder, {url.rpartition("/")[2]} if store else set()))
        if store:
            (folder / url.rpartition("/")[2]).mkdir(exist_ok=True)
        return folder / url[len(root) :].lstrip("/")

    changed: dict[str, Any] = {}
    order = sorted(found, key=lambda name: (name != "workspace", name != "store"))
    for name in order:
        value = found[name]
        if isinstance(value, tuple):
            changed[name] = tuple(str(local(each)) if url_of(each) else each for each in value)
        else:
            changed[name] = local(value, whole=name == "workspace", store=name == "store")
    return dataclasses.replace(settings, **changed)  # pyright: ignore[reportArgumentType]


def _renamed(value: Any, told: dict[str, str]) -> Any:
    """A result that names URLs, not mirrors."""
    if isinstance(value, str):
        for folder, url in told.items():
            value = value.replace(folder, url)
    elif isinstance(value, dict):
        return {_renamed(key, told): _renamed(each, told) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        return type(value)(_renamed(each, told) for each in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **_renamed(fields, told))
    return value
