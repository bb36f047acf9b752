"""A rolling store, its producer in a thread, and what is on the disk meanwhile."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import CONTEXT, text_of
from waiting import Child, wait_until

from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings
from lftpipe.results.outcomes import Extraction, PlannedExtraction
from lftpipe.store.windows import ROLLING_SPLIT

#: Bytes of a shard of four sequences: two states of 32 features in float16, checksums, the index.
SHARD = 4 * 2 * (CONTEXT * 32 * 2 + 4) + 16 * 2 * 4 + 4

#: Four shards of `train`, and the one of validation.
CAP = 5 * SHARD


def text_for(folder: Path, documents: int = 60) -> Path:
    """A folder of documents of about 300 tokens each."""
    folder.mkdir(parents=True)
    for seed in range(documents):
        (folder / f"{seed:03d}.md").write_text(text_of(seed, 150))
    return folder


def extraction(workspace: Path, teacher: Path, text: Path, **changes: Any) -> ExtractSettings:
    """Two states of 40 training sequences, ten shards, and four of validation; rolling unless changed."""
    given = {
        "workspace": workspace,
        "model": str(teacher),
        "corpus": str(text),
        "context": CONTEXT,
        "tokens": 40 * CONTEXT,
        "validation_tokens": 4 * CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "layers": "1,3",
        "attention": False,
        "compute_dtype": "float32",
        "shard_bytes": SHARD,
        "rolling": CAP,
        "threads": 1,
    }
    return ExtractSettings(**given | changes)


def bytes_of_states(store: Path) -> int:
    """On the disk now, unfinished files included."""
    total = 0
    for file in store.glob("*/*/c.*"):
        try:
            total += file.stat().st_size if file.parent.name not in ("tokens", "document") else 0
        except FileNotFoundError:
            continue
    return total


def training_shards(store: Path) -> dict[str, bytes]:
    """Those of `train` that are on the disk now."""
    return {file.name: file.read_bytes() for file in store.glob(f"{ROLLING_SPLIT}/hidden/c.*")}


class Producer:
    """`extract --rolling` in a thread, and the most bytes of states that were ever seen beside it."""

    def __init__(self, settings: ExtractSettings) -> None:
        self.store = settings.workspace / "neox/states.zarr"
        self.disk = Disk(self.store)
        self.result: PlannedExtraction | Extraction | None = None
        self.error: BaseException | None = None
        self._settings = settings
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self.disk.start()
        manifest = self.store / "manifest.json"
        wait_until(lambda: manifest.exists() or not self._thread.is_alive(), "the producer's first window")

    def join(self) -> dict[str, Any]:
        """What it returned, once all runs have finished."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "waited 30 s for the producer to end after the last run"
        if self.error:
            raise self.error
        assert isinstance(self.result, Extraction)
        return dict(self.result)

    def _work(self) -> None:
        try:
            self.result = extract(self._settings)
        except BaseException as error:
            self.error = error


@contextmanager
def beside(settings: ExtractSettings) -> Iterator[Producer]:
    """A producer that runs can be trained beside; it ends once they have finished."""
    producer = Producer(settings)
    producer.start()
    if producer.error:
        raise producer.error
    yield producer


class Restarted:
    """A process that does something; if it is killed another one does it again."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act, self._child = act, Child(act)

    @property
    def running(self) -> bool:
        return self._child.running

    def kill(self) -> bool:
        """Without warning; whether it was still at work."""
        if self._child.kill(signal.SIGKILL) != -signal.SIGKILL:
            return False
        self._child = Child(self._act)
        return True

    def end(self, seconds: float) -> int:
        """Wait for it, and kill it if it goes on: a producer that saw no run waits for one."""
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(0.05)
        return self._child.kill(signal.SIGKILL)

    def join(self) -> int:
        return self._child.join()


class Disk(threading.Thread):
    """The most bytes of states that were ever on the disk, until it is asked."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self._store, self._most, self._asked = store, 0, threading.Event()

    def run(self) -> None:
        while not self._asked.wait(0.01):
            self._most = max(self._most, bytes_of_states(self._store))

    def most(self) -> int:
        self._asked.set()
        self.join()
        return self._most
