"""Who writes to a bucket: an object that its writer renews, so that a second one is refused at once.

It is a courtesy. What makes two writers harmless is the log (`segments.py`): the one that began later wins.
No clocks are compared: whoever comes second watches for a while whether the object changes.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from lftpipe.errors import StoreBusyError, StoreError
from lftpipe.objects.client import refusals

LEASE = "writer.lease"

#: Renewals in the time after which a writer counts as dead.
BEATS = 4


def lease_seconds() -> float:
    """How long a writer may be silent: LFTPIPE_LEASE_SECONDS, or 20."""
    return float(os.environ.get("LFTPIPE_LEASE_SECONDS", "20"))


class Lease:
    """The right to write, as long as it is renewed.

    Parameters
    ----------
    place
        The mirror on this machine. It has a lock of its own, so that a lease of the same place is of a
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
                import obstore

                with refusals(self._where):
                    obstore.delete(self._client(), LEASE)

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
        import obstore

        try:
            with refusals(self._where):
                found = json.loads(obstore.get(self._client(), LEASE).bytes().to_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _renew(self) -> None:
        import obstore

        self._beat += 1
        content = {"writer": self._writer, "host": self._host, "place": self._place, "beat": self._beat}
        with refusals(self._where):
            obstore.put(self._client(), LEASE, json.dumps(content).encode(), use_multipart=False)
