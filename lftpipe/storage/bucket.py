"""Storage in a bucket, and a cache of the ranges that were read."""

import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from typing_extensions import override

from lftpipe.base.errors import StoreError
from lftpipe.storage.interface import Opened, Reads
from lftpipe.storage.lease import Lease, SegmentLog, answered, client_of, read_object, refusals

# --- Ranges of objects kept on this machine's disk, at most so many bytes, the longest unused dropped first.

_DIGEST_BYTES = 8


class RangeCache:
    """Files named by what they hold, in one folder that processes may share.

    Each begins with a digest: a damaged one counts as none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._bytes: int | None = None  # known once something is put
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["RangeCache"], tuple[Path, int]]:
        return RangeCache, (self.folder, self.max_bytes)

    def get(self, place: str) -> Any:
        """The bytes kept for a place; None if there are none."""
        path = self._path(place)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        found = memoryview(data)[_DIGEST_BYTES:]
        return found if xxhash.xxh3_64_digest(found) == data[:_DIGEST_BYTES] else None

    def put(self, place: str, data: Any) -> None:
        """Keep bytes; a disk that is full is no error."""
        path, size = self._path(place), len(data) + _DIGEST_BYTES
        if size > self.max_bytes:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        with self._lock, contextlib.suppress(OSError):
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(xxhash.xxh3_64_digest(data))
                    file.write(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._bytes = (self._bytes or 0) + size

    def _path(self, place: str) -> Path:
        digest = xxhash.xxh3_128_hexdigest(place.encode())
        return self.folder / digest[:2] / digest[2:]

    def _make_room(self, size: int) -> None:
        if self._bytes is not None and self._bytes + size <= self.max_bytes:
            return
        # Another process may have put and dropped some: look again.
        kept = []
        for file in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                found = file.stat()
                kept.append((found.st_mtime_ns, found.st_size, file))
        total = sum(found for _, found, _ in kept)
        for _, found, file in sorted(kept) if total + size > self.max_bytes else ():
            if total + size <= self.max_bytes * 9 // 10:
                break
            file.unlink(missing_ok=True)
            total -= found
        self._bytes = total


# --- A prefix of a bucket behind the interface: `s3://`, `gs://` and `az://`, through obstore.

#: Bytes of one part of a multipart put; S3 takes at most 10,000 parts.
PART_BYTES = 16 * 2**20
#: Ranges asked for, and objects put, at the same time.
CONCURRENCY = 16


class BucketStorage(SegmentLog):
    """Objects below a URL.

    An object is put whole or not at all. The log is numbered objects made by create-if-absent: a process that
    begins it takes the next number, and whoever wrote before fails at its next line.

    `url`: `s3://bucket/prefix` and the like. Credentials and endpoints come from the environment, as in every
    other program: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_...
    """

    def __init__(self, url: str, cache: RangeCache | None = None, place: str = "") -> None:
        self.where, self.remote, self.concurrency = url.rstrip("/"), True, CONCURRENCY
        self._cache, self._place = cache, place
        self._connected: tuple[int, Any] | None = None
        self.begin_segments(Lease(self.where, lambda: self.client, place))

    def __reduce__(self) -> tuple[type["BucketStorage"], tuple[str, RangeCache | None, str]]:
        return BucketStorage, (self.where, self._cache, self._place)

    @property
    def client(self) -> Any:
        """Obstore's.

        Raises `StoreError`: in a forked process: the threads that move the bytes do not survive a fork.
        """
        if self._connected is None:
            self._connected = os.getpid(), client_of(self.where)
        if self._connected[0] != os.getpid():
            raise StoreError(
                f"{self.where} in a forked process", "a process of its own", "start processes by spawn"
            )
        return self._connected[1]

    @override
    def open(self, name: str, end_bytes: int, size: int | None = None) -> Opened:
        return _ObjectFile(self, name, end_bytes, self.size(name) if size is None else size)

    def size(self, name: str) -> int:
        """Bytes of an object."""
        with refusals(self.where):
            return answered(lambda: self.client.head(name))["size"]

    @override
    def read(self, name: str) -> bytes:
        with refusals(self.where):
            return read_object(self.client, name)

    def read_range(self, name: str, start: int, length: int, key: str = "") -> Any:
        """Some bytes of an object.

        `name`, `start`, `length`: which bytes; fewer come at its end.
        `key`: names this content of the object for the cache; "" leaves the cache alone.
        """
        place = f"{self.where}/{name} {key} {start} {length}"
        if key and self._cache and (kept := self._cache.get(place)) is not None:
            return kept
        with refusals(self.where):
            data = memoryview(answered(lambda: self.client.get_range(name, start=start, length=length)))
        if key and self._cache:
            self._cache.put(place, data)
        return data

    @override
    def write(self, name: str, data: bytes) -> None:
        self.put(name, data)

    @override
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        wanted = set(names)
        return {name: size for name, size in self.entries() if name in wanted} if wanted else {}

    def entries(self, prefix: str | None = None) -> list[tuple[str, int]]:
        """Every object below a prefix, and its size.

        `prefix`: whole names of folders; None for all.
        """
        with refusals(self.where):
            found = answered(lambda: list(self.client.list(prefix, chunk_size=1000)))
        return [(each["path"], each["size"]) for batch in found for each in batch]

    @override
    def digest(self, name: str) -> str:
        digest = xxhash.xxh3_128()
        with refusals(self.where):
            for part in self.client.get(name).stream(min_chunk_size=2**20):
                digest.update(memoryview(part))
        return digest.hexdigest()

    @override
    def names(self) -> set[str]:
        folders, files = self.folder()
        return {*folders, *files}

    @override
    def delete(self, name: str) -> None:
        paths = [path for path, _ in self.entries(name)] or [name]
        with refusals(self.where):
            for first in range(0, len(paths), 1000):
                answered(partial(self.client.delete, paths[first : first + 1000]))

    @override
    def total_bytes(self) -> int:
        return sum(size for _, size in self.entries())

    def put(self, name: str, content: Path | bytes) -> str:
        """Put an object, in parts if it is large; its tag. Of a file that may change, give the bytes."""
        with refusals(self.where):
            put = answered(lambda: self.client.put(name, content, chunk_size=PART_BYTES, max_concurrency=4))
        return put.get("e_tag") or ""

    def folder(self, prefix: str | None = None) -> tuple[list[str], dict[str, str]]:
        """Folders, and files with their tags, right below a prefix; None for the top."""
        with refusals(self.where):
            found = answered(lambda: self.client.list_with_delimiter(prefix))
        files = {each["path"]: each.get("e_tag") or "" for each in found["objects"]}
        return [path.rstrip("/") for path in found["common_prefixes"]], files

    @override
    def take(self, folder: Path, names: Iterable[str]) -> None:
        def move(name: str) -> None:
            self.put(name, folder / name)
            (folder / name).unlink()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(move, names))


class _ObjectFile(Opened):
    """One object, as its end was when it was opened."""

    def __init__(self, storage: BucketStorage, name: str, end_bytes: int, size: int) -> None:
        import obstore

        self._storage, self._name = storage, name
        self.size, self.end = size, b""
        with refusals(storage.where):
            try:
                wanted = {"range": (max(size - end_bytes, 0), max(size, 1))}
                answer = storage.client.get(name, options=wanted)
                self.size, self.end = answer.meta["size"], answer.bytes().to_bytes()
            except obstore.exceptions.BaseError:  # it is shorter than that, or cannot be had at all
                self.size = storage.size(name)
            if self.size != size:
                start = max(self.size - end_bytes, 0)
                self.end = bytes(storage.read_range(name, start, self.size - start)) if self.size else b""
        self._key = xxhash.xxh3_64_hexdigest(self.end) + f" {self.size}"

    def read_into(self, buffers: list[Any], start: int) -> int:
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        if start + wanted > self.size:
            return 0
        data = memoryview(self._storage.read_range(self._name, start, wanted, self._key))
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            view[:] = data[: len(view)]
            data = data[len(view) :]
        return wanted


def connect(url: str, cache: RangeCache | None = None, place: str = "") -> Reads:
    """The storage behind a URL."""
    if url.startswith("hf://"):
        from lftpipe.storage.hub import HubStorage

        return HubStorage(url)
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise StoreError(url, "obstore installed", 'run `pip install "lftpipe[objects]"`') from None
    return BucketStorage(url, cache, place)
