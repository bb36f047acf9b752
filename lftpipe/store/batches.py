"""Endless shuffled batches: a function of seed and step, and read ahead by a thread."""

import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

States = dict[int, Float[np.ndarray, "sequence position feature"]]  # by layer l
Buffer = dict[str, States]  # by array, "hidden" or "attention"


class Logits(NamedTuple):
    """The teacher's largest next-token logits at each position, and what makes probabilities of them."""

    values: Float[np.ndarray, "sequence position rank"]
    """The largest logits, descending."""
    ids: Int32[np.ndarray, "sequence position rank"]
    """Their tokens."""
    normaliser: Float32[np.ndarray, "sequence position"]
    """Log of the sum of all exponentials: `exp(values - normaliser)` are probabilities."""


@dataclass(frozen=True)
class Batch:
    """Some sequences of a split. The arrays are overwritten once the next batch is asked for."""

    step: int
    sequences: Int64[np.ndarray, "sequence"]
    states: States
    tokens: Int32[np.ndarray, "sequence position"] | None
    document: Int32[np.ndarray, "sequence position"] | None
    logits: Logits | None = None
    attention: States = field(default_factory=dict)
    """Attention outputs, if asked for."""


@functools.lru_cache(maxsize=2)
def _epoch(num_sequences: int, seed: int, epoch: int, window: int) -> Int64[np.ndarray, "sequence"]:
    if not window:
        return np.random.default_rng([seed, epoch]).permutation(num_sequences)
    firsts = range(0, num_sequences, window)
    parts = [
        first + np.random.default_rng([seed, epoch, number]).permutation(min(window, num_sequences - first))
        for number, first in enumerate(firsts)
    ]
    return np.concatenate(parts)


def batch_sequences(
    num_sequences: int, batch_size: int, seed: int, step: int, window: int = 0
) -> Int64[np.ndarray, "sequence"]:
    """The sequences of one batch: a part of all epochs' permutations, one after the other.

    Every epoch shows every sequence once; a batch may end one epoch and begin the next.

    Parameters
    ----------
    num_sequences
        Sequences of the split.
    batch_size
        Sequences of a batch.
    seed
        Decides the order of each epoch.
    step
        Which batch, from 0.
    window
        Sequences that are shuffled among themselves, one window after the other; 0 shuffles the whole split.
    """
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = np.divmod(place, num_sequences)
    parts = [
        _epoch(num_sequences, seed, int(epoch), window)[within[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


def read_ahead(
    fill: Callable[[int, Buffer], Batch],
    buffers: list[Buffer],
    start_step: int,
    stop: threading.Event | None = None,
) -> Iterator[Batch]:
    """The batches that ``fill`` reads, one after the other, into the same few buffers.

    Parameters
    ----------
    fill
        Reads the batch of a step into the buffer given.
    buffers
        One of them is being used and one being read into; the rest hold batches that are ready. With a single
        one each batch is read when it is asked for, without a thread.
    start_step
        Step of the first batch.
    stop
        Is set when no more batches are wanted, for a `fill` that waits.
    """
    stop = stop or threading.Event()
    if len(buffers) == 1:
        yield from (fill(step, buffers[0]) for step in itertools.count(start_step))
    free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Batch, Buffer] | BaseException] = queue.SimpleQueue()
    owner = os.getpid()
    for buffer in buffers:
        free.put(buffer)

    def work() -> None:
        try:
            for step in itertools.count(start_step):
                buffer = free.get()
                if stop.is_set():
                    return
                ready.put((fill(step, buffer), buffer))
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="lftpipe-batches", daemon=True)
    thread.start()
    try:
        while True:
            if os.getpid() != owner:
                raise RuntimeError(
                    "these batches belong to the process that began them: call batches() in this one"
                )
            done = ready.get()
            if isinstance(done, BaseException):
                raise done
            batch, buffer = done
            yield batch
            free.put(buffer)
    finally:
        stop.set()
        free.put({})
        thread.join()
