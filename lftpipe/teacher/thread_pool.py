"""Threads that compute side by side, so that results do not depend on how many there are.

A matrix product that several threads share adds its parts in an order that depends on their number, and so do
its last bits. Here every product is one thread's. It is often faster too: nobody waits for the thread that
lost its core.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lanes:
    """So many threads, each with products of its own; a single lane is the caller's own thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._own = threading.local()
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def on(cls, device: torch.device, most: int) -> "Lanes":
        """A lane for each of torch's threads where the processor computes; a device has one."""
        return cls(min(torch.get_num_threads(), most) if device.type == "cpu" else 1)

    def map(self, function: Callable[[int, Item], Result], items: Iterable[Item | None]) -> Iterator[Result]:
        """Results in the order of the items, of which some more are in the making.

        `function`: is given the number of the lane, and an item. Lanes share nothing else.
        `items`: taken by the caller's thread as lanes get free; None if there is none for now: then results
        that are due are handed out, and it is asked again.
        """
        if self._pool is None:
            yield from (function(0, item) for item in items if item is not None)
            return

        def compute(item: Item) -> Result:
            return function(self._own.number, item)

        due: deque[Future[Result]] = deque()
        for item in items:
            if item is not None:
                due.append(self._pool.submit(compute, item))
            # One more than there are lanes: while the caller uses a result, all of them have work.
            while len(due) > self.count or (item is None and due and due[0].done()):
                yield due.popleft().result()
        while due:
            yield due.popleft().result()

    def __enter__(self) -> "Lanes":
        self._threads = torch.get_num_threads()
        if self.count > 1:
            self._numbers = queue.SimpleQueue()  # of the lanes to come: threads begin only as they are needed
            for number in range(self.count):
                self._numbers.put(number)
            self._pool = ThreadPoolExecutor(self.count, "lane", self._begin)
        torch.set_num_threads(1)  # the caller's helpers would spin on cores that the lanes need
        return self

    def _begin(self) -> None:
        self._own.number = self._numbers.get()
        torch.set_num_threads(1)  # of this thread, and of those that begin later

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        torch.set_num_threads(self._threads)
