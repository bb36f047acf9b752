"""How the producer of a rolling store and the runs that read it know of each other: small files in the store.

`readers/NAME.json` says where a run stands, `producer.lock` is locked (flock) while a producer lives.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lftpipe.errors import StoreError
from lftpipe.files import fingerprint, read_sealed, write_sealed

READERS, PRODUCER = "readers", "producer.lock"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A run that reads a rolling store, as it stood at its last checkpoint."""

    run: str
    """Its folder, absolute."""
    begun: str
    """A file that is there as long as the run is."""
    finished: str
    """A file that is there once the run is finished."""
    position: int
    """Sequences that its last checkpoint has passed, through all epochs."""
    end: int
    """Sequences that it passes in all."""
    batch: int
    """Sequences of a batch."""

    @property
    def is_over(self) -> bool:
        """Whether the run needs nothing any more: it is finished, or its folder is gone."""
        return Path(self.finished).exists() or not Path(self.begun).exists()

    @property
    def name(self) -> str:
        """Of its file, beside those of all others."""
        return f"{Path(self.run).name}-{fingerprint(self.run)[:8]}.json"


def register(store: Path, reader: Reader) -> None:
    """Say where a run stands: windows before it may be dropped, those after it are needed."""
    (store / READERS).mkdir(exist_ok=True)
    write_sealed(store / READERS / reader.name, asdict(reader))


def unregister(store: Path, reader: Reader) -> None:
    """Say that a run needs nothing any more."""
    (store / READERS / reader.name).unlink(missing_ok=True)


def registered(store: Path) -> dict[Path, Reader]:
    """The runs that a store is read by, and the file of each; those that are over are taken off."""
    found = {}
    for file in sorted((store / READERS).glob("*.json")):
        try:
            reader = Reader(**read_sealed(file))
        except FileNotFoundError:
            continue  # taken off just now
        except (ValueError, TypeError):
            raise StoreError(
                f"damaged {file}", "what a run wrote there", "delete the file; the run writes it again"
            ) from None
        if reader.is_over:
            file.unlink(missing_ok=True)
        else:
            found[file] = reader
    return found


@contextmanager
def producing(store: Path) -> Iterator[None]:
    """Be known to live to all that wait for shards.

    Parameters
    ----------
    store
        The store's folder, of which this process is the one writer.
    """
    lock = os.open(store / PRODUCER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who asks for it holds it for an instant
        yield
    finally:
        os.close(lock)


def producer_lives(store: Path) -> bool:
    """Whether a process makes the shards of a store."""
    try:
        lock = os.open(store / PRODUCER, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
