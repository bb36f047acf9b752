"""Worker processes on this machine: each owns whole shards; whichever dies, its shards go to another."""

import multiprocessing
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lftpipe.base import executor
from lftpipe.base.device import prepare
from lftpipe.base.errors import LftpipeError, StoreError
from lftpipe.extraction.compute import Work
from lftpipe.extraction.shard_job import FrozenPlan, Producer
from lftpipe.store import ShardKey

#: Workers that die one after the other, in the same place and with nothing done, until the run is given up.
MOST_DEATHS = 5

#: Seconds between two looks for the next shard.
POLL = 0.1


def run_workers(work: Work) -> None:
    """Compute a plan's shards in `settings.workers` spawned processes, each committed as it comes.

    Raises
    ------
    LftpipeError
        The first one that a worker raises: it is not tried again, as it would come again. A worker that
        dies is replaced.
    """
    crew = _Crew(work, min(work.settings.workers, len(work.keys)))
    try:
        crew.run()
    finally:
        crew.end()


class _Worker:
    """The driver's side of a process: what it was given and has not handed in."""

    def __init__(self, process: BaseProcess, connection: Connection, deaths: int) -> None:
        self.process, self.connection = process, connection
        self.deaths = deaths
        """How many before it died in its place without handing anything in."""
        self.given: list[ShardKey] = []
        self.tokens = 0
        """That it computed of these."""
        self.waits = False
        """For a shard."""

    def end(self) -> None:
        """Kill it: what it has not handed in is not committed."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Crew:
    """The workers, and the shards that none of them has."""

    def __init__(self, work: Work, count: int) -> None:
        self._work, self._count = work, count
        self._todo = deque(work.keys)
        self._left = set(work.keys)  # not committed
        self._measure = work.measure
        self._workers = [self._start(number) for number in range(count)]

    def run(self) -> None:
        """Until all shards are committed."""
        while self._left or self._measure:
            ready = wait([worker.connection for worker in self._workers])
            for number, worker in enumerate(self._workers):
                if worker.connection in ready and not self._hear(worker):
                    self._replace(number)

    def end(self) -> None:
        """No process is left."""
        for worker in self._workers:
            worker.end()

    def _start(self, number: int, deaths: int = 0) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        device, threads = executor.place_of(
            self._work.settings.device, self._work.settings.threads, number, self._count
        )
        measure = self._measure and number == 0
        process = context.Process(
            target=_work,
            args=(theirs, self._work.plan.to_json(), device, threads, measure),
            name=f"lftpipe-worker-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, deaths)

    def _hear(self, worker: _Worker) -> bool:
        """Take one message; False if the process has died."""
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        if kind == "advance":
            worker.tokens += content
            self._work.advance(content)
        elif kind == "next":
            worker.waits = True
            self._give()
        elif kind == "sealed":
            worker.given.remove(content.key)
            worker.tokens -= len(content.key.sequences) * self._work.plan.spec.context
            worker.deaths = 0
            self._work.commit(content)
            self._left.remove(content.key)
        elif kind == "measured":
            self._measure = False
            self._work.note(content)
        else:
            raise content
        return True

    def _give(self) -> None:
        """A shard to each worker that waits for one."""
        for worker in self._workers:
            if worker.waits and self._todo:
                worker.waits = False
                worker.given.append(self._todo.popleft())
                with suppress(OSError):  # it has died, which is seen when it is heard
                    worker.connection.send(worker.given[-1])

    def _replace(self, number: int) -> None:
        """What a dead worker had goes to others, and another takes its place."""
        dead = self._workers[number]
        dead.end()
        self._work.advance(-dead.tokens)
        if dead.deaths + 1 == MOST_DEATHS:
            raise StoreError(
                f"{MOST_DEATHS} workers that died one after the other, the last with exit code "
                f"{dead.process.exitcode}",
                "processes that live",
                "look for what kills them (memory?) or try fewer --workers; what is committed is kept",
            )
        self._todo.extendleft(reversed(dead.given))
        self._workers[number] = self._start(number, dead.deaths + 1)
        self._give()


def _work(
    connection: Connection, plan: dict[str, Any], device: str, threads: int | None, measure: bool
) -> None:
    """A worker's process."""
    executor.begin()
    lock = threading.Lock()

    def say(kind: str, content: Any = None) -> None:
        with lock:  # shards are handed in by a thread
            connection.send((kind, content))

    try:
        prepare(device, threads)
        frozen = FrozenPlan.from_json(plan)
        producer = Producer(frozen, device, frozen.open_teacher())
        if measure:
            say("measured", producer.measure())
        producer.run(
            _keys(connection, say),
            lambda sealed: say("sealed", sealed),
            lambda tokens: say("advance", tokens),
        )
    except (EOFError, BrokenPipeError):
        pass  # the driver has ended
    except LftpipeError as error:
        say("error", error)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        say("error", RuntimeError(f"{reason} (in a worker; --workers 1 --debug shows where)"))


def _keys(connection: Connection, say: Callable[..., None]) -> Iterator[ShardKey | None]:
    """The shards that the driver gives this worker, until it ends it; None while it has none."""
    while True:
        say("next")
        while not connection.poll(POLL):
            yield None
        yield connection.recv()
