"""Tasks shared out to this process, to several, or to a Ray cluster; one driver takes the results."""

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from lftpipe.base.allocator import keep_freed_memory
from lftpipe.base.device import prepared
from lftpipe.base.errors import LftpipeError, SettingsError, reason_of

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Takes the result of a task.
Done = Callable[[Task, Result], object]
#: Called with how much of the work was done, in the unit of `Job.size`.
Advance = Callable[[int], object]

#: Seconds between two looks for the next task.
POLL = 0.1

#: Times that Ray runs a task again whose process or node died. Preemption does not count.
RETRIES = 10

#: Tasks that Ray is asked for at once, for each that can run: the next one waits beside the process.
AHEAD = 2


class Place(NamedTuple):
    """Where to compute."""

    device: str
    threads: int | None
    """None leaves torch's own choice."""

    def of_worker(self, number: int, count: int) -> "Place":
        """The place of one of several processes: a GPU, or its part of the threads."""
        if self.device == "cuda":
            return Place(f"cuda:{number % max(torch.cuda.device_count(), 1)}", self.threads)
        return Place(self.device, max(1, (self.threads or torch.get_num_threads()) // count))


#: Does tasks in one process as they come, None where there is none for now; what it has loaded stays.
Worker = Callable[[Iterable[Task | None], Done[Task, Result], Advance], None]


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Task, Result]):
    """Tasks, who does them, and who takes the results. An executor chooses only where each is done."""

    tasks: list[Task]
    start: Callable[[Place], Worker[Task, Result]]
    """Called once in each process; picklable unless it is this one."""
    done: Done[Task, Result]
    """Called in this process, from one thread at a time."""
    advance: Advance
    size: Callable[[Task], int]
    place: Place
    most_deaths: int = 5
    """Processes that die one after the other, with nothing done, until the job fails."""
    cure: str = "what is committed is kept"
    """What of the work is not lost if processes die."""


def execute(job: Job[Any, Any], *, workers: int = 1, ray: str | None = None) -> None:
    """Do all tasks of a job in this process, in `workers` spawned ones, or on the Ray cluster at an address.

    Raises `LftpipeError`: the first one that a task raises: it is not tried again, as it would come again. A
    process that dies is replaced, and its tasks go to others.
    """
    if ray is not None:
        _run_on_ray(job, ray)
    elif workers > 1:
        with _Crew(job, min(workers, len(job.tasks))) as crew:
            crew.run()
    else:
        job.start(job.place)(job.tasks, job.done, job.advance)


def portable(error: Exception, where: str = "in a worker; --workers 1 --debug shows where") -> Exception:
    """An error that another process can unpickle: those of libraries may not."""
    if isinstance(error, LftpipeError):
        return error
    return RuntimeError(f"{type(error).__name__}: {reason_of(error)} ({where})")


# --- processes on this machine ----------------------------------------------------------------------


class _Process:
    """The driver's side of a process."""

    def __init__(self, process: BaseProcess, connection: Connection, deaths: int) -> None:
        self.process, self.connection = process, connection
        self.deaths = deaths  # how many died before it in its place without finishing a task
        self.tasks: list[Any] = []  # that it has and did not finish
        self.advanced = 0  # of these
        self.is_waiting = False

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Crew:
    """The processes, and the tasks that none of them has."""

    def __init__(self, job: Job[Any, Any], count: int) -> None:
        self._job, self._count = job, count
        self._todo = deque(job.tasks)
        self._unfinished = len(job.tasks)
        self._processes = [self._start(number) for number in range(count)]

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def run(self) -> None:
        while self._unfinished:
            ready = wait([process.connection for process in self._processes])
            for number, process in enumerate(self._processes):
                if process.connection in ready and not self._receive(process):
                    self._replace(number)

    def _start(self, number: int, deaths: int = 0) -> _Process:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        place = self._job.place.of_worker(number, self._count)
        process = context.Process(
            target=_work, args=(theirs, self._job.start, place), name=f"lftpipe-worker-{number}", daemon=True
        )
        process.start()
        theirs.close()
        return _Process(process, ours, deaths)

    def _receive(self, process: _Process) -> bool:
        """Take one message; False if the process has died."""
        try:
            kind, *content = process.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        if kind == "next":
            process.is_waiting = True
            self._hand_out()
        elif kind == "advance":
            process.advanced += content[0]
            self._job.advance(content[0])
        elif kind == "done":
            task, result = content
            process.tasks.remove(task)
            process.advanced -= self._job.size(task)
            process.deaths = 0
            self._job.done(task, result)
            self._unfinished -= 1
        else:
            raise content[0]
        return True

    def _hand_out(self) -> None:
        for process in self._processes:
            if process.is_waiting and self._todo:
                process.is_waiting = False
                process.tasks.append(self._todo.popleft())
                with suppress(OSError):  # it has died: the next `_receive` finds that
                    process.connection.send(process.tasks[-1])

    def _replace(self, number: int) -> None:
        dead = self._processes[number]
        dead.end()
        self._job.advance(-dead.advanced)
        if dead.deaths + 1 == self._job.most_deaths:
            raise LftpipeError(
                f"a process that died with exit code {dead.process.exitcode}"
                + (f", as {dead.deaths} before it did" if dead.deaths else ""),
                "processes that live",
                f"look for what kills them (memory?) or try fewer --workers; {self._job.cure}",
            )
        self._todo.extendleft(reversed(dead.tasks))
        self._processes[number] = self._start(number, dead.deaths + 1)
        self._hand_out()


def _work(connection: Connection, start: Callable[[Place], Worker[Any, Any]], place: Place) -> None:
    """A process: leaves Ctrl-C to the driver, and ends with it, even if that is killed."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:  # a worker may finish tasks in a thread
            connection.send(message)

    try:
        with prepared(*place):
            start(place)(
                _received(connection, send),
                lambda task, result: send("done", task, result),
                lambda amount: send("advance", amount),
            )
    except (EOFError, BrokenPipeError):
        pass  # the driver has ended
    except Exception as error:
        send("error", portable(error))


def _received(connection: Connection, send: Callable[..., None]) -> Iterator[Any]:
    """The tasks from the driver, until it ends this process."""
    while True:
        send("next")
        while not connection.poll(POLL):
            yield None
        yield connection.recv()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- a Ray cluster ----------------------------------------------------------------------------------


def _run_on_ray(job: Job[Any, Any], address: str) -> None:
    """Ray does a task again if its process dies or its result is lost, never if it raised an error."""
    ray = _ray()
    ours = _connect(ray, address)
    try:
        with redirect_stdout(sys.stderr):  # Ray prints there of a node that died, and `--json` has it alone
            _share_on_ray(ray, job)
    finally:
        if ours:
            ray.shutdown()


def _share_on_ray(ray: Any, job: Job[Any, Any]) -> None:
    cuda = job.place.device.startswith("cuda")
    threads = job.place.threads or (None if cuda else torch.get_num_threads())
    processors = threads or 1
    resources = ray.cluster_resources()
    slots = int(resources.get("GPU", 0) if cuda else resources.get("CPU", 1) // processors)
    if slots < 1:
        raise SettingsError(
            "--ray with no GPU" if cuda else f"--ray with no machine of {threads} CPUs",
            "a cluster that can run a task",
            "pass fewer --threads" if not cuda else "pass --device cpu, or add GPUs to the cluster",
        )
    remote = ray.remote(_do).options(
        num_cpus=processors,
        num_gpus=1 if cuda else 0,
        max_retries=RETRIES,
        retry_exceptions=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}} if threads else {},
    )
    start = ray.put(pickle.dumps(job.start))
    tasks, running = iter(job.tasks), {}
    try:
        while True:
            for task in tasks:
                running[remote.remote(start, job.place._replace(threads=threads), task)] = task
                if len(running) >= slots * AHEAD:
                    break
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready)
            job.done(task, _result(ray, ready, job.cure))
            job.advance(job.size(task))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _do(start: bytes, place: Place, task: Any) -> Any:
    """A task of Ray, which runs it in whatever process has time."""
    results: list[Any] = []
    with prepared(*place):
        _started(start, place)([task], lambda _, result: results.append(result), lambda _: None)
    return results[0]


@functools.lru_cache(maxsize=1)
def _started(start: bytes, place: Place) -> Worker[Any, Any]:
    """What it has loaded stays in the process for the next task."""
    return pickle.loads(start)(place)


def _result(ray: Any, reference: Any, cure: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise portable(error.cause, "in a task of Ray") from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise LftpipeError(
            f"a task of Ray that died {RETRIES + 1} times ({reason})",
            "processes that live",
            f"look for what kills them (memory?); {cure}",
        ) from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SettingsError(
            "--ray without Ray", "the package ray", "install it: pip install 'lftpipe[ray]'"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Join a cluster, or begin one on this machine; whether this process did."""
    if ray.is_initialized():
        return False
    local = address == "local"
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            include_dashboard=False if local else None,
            runtime_env={"env_vars": {"PYTHONPATH": ":".join(filter(None, sys.path))}} if local else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"--ray {address} ({reason})", "the address of a Ray cluster", "check it with `ray status`"
        ) from None
    return True
