"""The client of a bucket; one writer by a lease that lives as long as its holder; a log of segments."""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from typing_extensions import override

from lftpipe.base.errors import StoreBusyError, StoreError
from lftpipe.storage.interface import Writes

T = TypeVar("T")

# --- The connection to a bucket, and its refusals as our errors.

#: What is in the messages of a bucket, or of a cloud's service for credentials, that gives no access.
_NO_ACCESS = (
    "169.254.169.254",
    "metadata.google",
    "credential",
    "Unauthenticated",
    "PermissionDenied",
    "403 Forbidden",
)


#: In the message of an answer that broke off, and how many times it is asked for.
_BROKE_OFF, _TRIES = "response body error", 5

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")


def client_of(url: str) -> Any:
    """Obstore's client for a URL.

    `url`: of a bucket, and of what of it is meant.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    seconds = float(os.environ.get("LFTPIPE_RETRY_SECONDS", "60"))
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        return from_url(
            url,
            client_options={
                "connect_timeout": timedelta(seconds=min(seconds, 10)),
                "timeout": timedelta(seconds=max(seconds, 30)),
                "allow_http": endpoint.startswith("http://") or os.environ.get("AWS_ALLOW_HTTP") == "true",
            },
            retry_config={"max_retries": 8, "retry_timeout": timedelta(seconds=seconds)},
        )
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{url} ({_first_line(error)})", "a bucket's URL", "write it as s3://bucket/folder"
        ) from None


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """What a bucket refuses, in one line each.

    Raises `StoreError` if it cannot be reached, is not there, or gives no access.
    Raises `FileNotFoundError, FileExistsError` if an object is missing, or is there and should not be.
    """
    from obstore import exceptions as refused

    try:
        yield
    except FileNotFoundError as error:
        if any(word in str(error) for word in _NO_BUCKET):
            raise _no_bucket(where) from None
        raise FileNotFoundError(f"{where} has no such object") from None
    except refused.AlreadyExistsError as error:
        raise FileExistsError(where) from error
    except (refused.BaseError, OSError, TimeoutError) as error:
        text = str(error)
        if any(word in text for word in _NO_BUCKET):
            raise _no_bucket(where) from None
        if isinstance(error, refused.UnauthenticatedError | refused.PermissionDeniedError) or any(
            word in text for word in _NO_ACCESS
        ):
            raise StoreError(
                f"{where}: no access ({_first_line(error)})",
                "credentials for it in the environment",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud",
            ) from None
        raise StoreError(
            f"{where} cannot be reached ({_first_line(error)})",
            "an object store that answers",
            "look at network and endpoint, then run the same command again: what is committed is kept",
        ) from None


def answered(request: Callable[[], T]) -> T:
    """What a request gives. One whose answer breaks off is made again: obstore does so for some kinds only.

    `request`: may be made twice.
    """
    from obstore.exceptions import BaseError

    for _ in range(_TRIES - 1):
        try:
            return request()
        except BaseError as error:
            if _BROKE_OFF not in str(error):
                raise
    return request()


def read_object(client: Any, name: str) -> bytes:
    """A whole object."""
    return answered(lambda: client.get(name).bytes().to_bytes())


def _no_bucket(where: str) -> StoreError:
    return StoreError(f"{where}, whose bucket is not there", "a bucket", "make it first")


def _first_line(error: BaseException) -> str:
    """The first words of an error, without the servers' pages behind them."""
    text = str(error).strip().partition("\n")[0]
    return text if len(text) < 300 else f"{text[:300]}..."


# --- Who writes to a bucket: an object that its writer renews, so that a second one is refused at once.
#
# It is a courtesy. What makes two writers harmless is the log (`segments.py`): the one that began later
# wins. No clocks are compared: whoever comes second watches for a while whether the object changes.

LEASE = "writer.lease"

#: Renewals in the time after which a writer counts as dead.
BEATS = 4


def lease_seconds() -> float:
    """How long a writer may be silent: LFTPIPE_LEASE_SECONDS, or 20."""
    return float(os.environ.get("LFTPIPE_LEASE_SECONDS", "20"))


class Lease:
    """The right to write, as long as it is renewed.

    `place`: the mirror on this machine. It has a lock of its own, so that a lease of the same place is of a
    process that is gone.
    """

    def __init__(self, where: str, client: Callable[[], Any], place: str) -> None:
        self._where, self._client = where, client
        self._writer, self._host, self._place = uuid.uuid4().hex, socket.gethostname(), place
        self._beat, self._stop = 0, threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Become the writer."""
        if self._thread is not None:
            return
        found = self._read()
        if found and (found.get("host"), found.get("place")) != (self._host, self._place):
            self._refuse_if_it_lives(found)
        self._renew()
        self._stop.clear()
        self._thread = threading.Thread(target=self._keep, name="lftpipe-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next one write at once."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(StoreError):  # then it runs out
            if self._is_mine():
                with refusals(self._where):
                    self._client().delete(LEASE)

    def _keep(self) -> None:
        """Renew it until the end, or until another writer has it."""
        while not self._stop.wait(lease_seconds() / BEATS):
            with contextlib.suppress(StoreError):  # the log says what is wrong
                if not self._is_mine():
                    return
                self._renew()

    def _refuse_if_it_lives(self, found: dict[str, Any]) -> None:
        until = time.monotonic() + lease_seconds()
        while time.monotonic() < until:
            time.sleep(lease_seconds() / BEATS / 4)
            if (now := self._read()) is None:
                return
            if now != found:
                raise StoreBusyError(
                    f"{self._where} is being written by another process, on {now.get('host')}",
                    "one writer at a time",
                    "wait for it or end it",
                )

    def _is_mine(self) -> bool:
        return (self._read() or {}).get("writer") == self._writer

    def _read(self) -> dict[str, Any] | None:
        try:
            with refusals(self._where):
                found = json.loads(read_object(self._client(), LEASE))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _renew(self) -> None:
        self._beat += 1
        content = {"writer": self._writer, "host": self._host, "place": self._place, "beat": self._beat}
        with refusals(self._where):
            answered(lambda: self._client().put(LEASE, json.dumps(content).encode(), use_multipart=False))


# --- A log where nothing can be appended to: numbered objects, each made only if it is absent.

_SEGMENT = re.compile(r"journal\.(\d{12})\.jsonl")


class SegmentLog(Writes):
    """The log of a bucket.

    A process that begins it takes the next number; whoever wrote before fails at its next line.
    """

    @property
    @abstractmethod
    def client(self) -> Any:
        """Obstore's."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object."""

    def begin_segments(self, lease: Lease) -> None:
        """Know of none yet."""
        self._lease = lease
        self._segment = -1  # the last one that this process made
        self._log = threading.Lock()

    @override
    def begin_log(self, data: bytes) -> None:
        self._lease.take()
        with self._log:
            older = self._segments()
            if self._segment >= 0 and max(older, default=-1) != self._segment:
                raise self._taken_over()
            self._create(max(older, default=-1) + 1, b"begin\n" + data)
            self._remove(older)

    @override
    def append_log(self, line: bytes) -> None:
        with self._log:
            before = self._segment
            self._create(before + 1, line)
            # Whoever took over has removed them all, in ascending order; then even the next one may be free.
            try:
                self.size(self._name(before))
            except FileNotFoundError:
                self._remove([self._segment])
                raise self._taken_over() from None

    @override
    def read_log(self) -> bytes | None:
        def segment(number: int) -> bytes:
            try:
                return self.read(self._name(number))
            except FileNotFoundError:  # the log was begun anew just now
                return b""

        lines: bytes | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            segments = list(pool.map(segment, self._segments()))
        for data in filter(None, segments):
            first, _, rest = data.partition(b"\n")
            lines = rest if first == b"begin" else (lines or b"") + data
        return lines

    @override
    def remove_log(self) -> None:
        self._remove(self._segments())

    @override
    def close(self) -> None:
        self._lease.release()  # a later log of the same writer goes on from its last object

    def _segments(self) -> list[int]:
        found = (_SEGMENT.fullmatch(name) for name in self.names())
        return sorted(int(match[1]) for match in found if match)

    def _name(self, number: int) -> str:
        return f"journal.{number:012d}.jsonl"

    def _create(self, number: int, data: bytes) -> None:
        try:
            with refusals(self.where):
                answered(lambda: self.client.put(self._name(number), data, mode="create"))
        except FileExistsError:
            # A put whose answer was lost is tried again, and meets itself.
            if self.read(self._name(number)) != data:
                raise self._taken_over() from None
        self._segment = number

    def _remove(self, numbers: list[int]) -> None:
        for number in numbers:
            with refusals(self.where):
                answered(lambda number=number: self.client.delete(self._name(number)))

    def _taken_over(self) -> StoreError:
        return StoreError(
            f"{self.where} is being written by another process",
            "one writer at a time",
            "wait for it or end it",
        )
