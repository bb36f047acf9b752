"""The ring between device and disk: nothing is overtaken, overwritten or lost, however late a copy is."""

import queue
import threading
import time

import numpy as np
import pytest
import torch
from fake_states import files, make_spec, states, tokens, write
from torch import Tensor

from lftpipe.base.errors import StoreError
from lftpipe.extraction.async_writer import Background
from lftpipe.extraction.device_to_host import Direct, Ring
from lftpipe.store import StoreWriter, produce_shard

SPEC = make_spec(sequences={"train": 13, "validation": 3})


class LateStream:
    """Copies in a thread, a while after they are asked for, as a device's copy engine may."""

    def __init__(self, delay: float) -> None:
        self._asked: queue.Queue[tuple[Tensor, Tensor, threading.Event]] = queue.Queue()
        self._delay, self.copies, self.bytes = delay, 0, 0
        threading.Thread(target=self._run, daemon=True).start()

    def memory(self, num_bytes: int) -> Tensor:
        self.bytes = num_bytes
        return torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN, if it is read too early

    def copy(self, target: Tensor, source: Tensor) -> "LateEvent":
        done = threading.Event()
        self._asked.put((target, source, done))
        return LateEvent(done)

    def _run(self) -> None:
        while True:
            target, source, done = self._asked.get()
            time.sleep(self._delay)
            target.copy_(source)
            self.copies += 1
            done.set()


class LateEvent:
    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def synchronize(self) -> None:
        assert self._done.wait(20)


def extract(path, transfer, in_flight: int = 2, change=lambda block: block) -> None:
    """As `Passes` does it; every block is overwritten at once, as the teacher's memory is."""
    with StoreWriter.open(path, SPEC) as writer:
        for split in SPEC.sequences:
            writer.put_tokens(split, *tokens(SPEC, split))

        def opening(key):
            return produce_shard(path, SPEC, key, f"a{key.split}{key.index}")

        with Background(opening, writer.commit, transfer, in_flight) as background:
            for key in writer.pending():
                background.begin_shard(key)
                for first in range(0, len(key.sequences), 3):
                    for array, layers in (("hidden", SPEC.layers), ("attention", SPEC.attention_layers)):
                        for layer in layers:
                            rows = key.sequences[first : first + 3]
                            block = torch.from_numpy(change(states(SPEC, key.split, array, layer, rows)))
                            background.put(array, layer, first, block)
                            block.fill_(7.0)
                background.end_shard()
        writer.finish()


@pytest.mark.parametrize("num_bytes", [1600, 5000, 100_000])  # of a ring; a batch has up to 1440
@pytest.mark.parametrize("in_flight", [2, 5])
def test_a_ring_of_any_size_gives_the_same_store(tmp_path, num_bytes, in_flight):
    write(tmp_path / "expected", SPEC)
    stream = LateStream(0.001)
    extract(tmp_path / "ring", Ring(stream, num_bytes), in_flight)
    assert files(tmp_path / "ring") == files(tmp_path / "expected")
    assert stream.copies == 5 * (2 + 2 + 2 + 1 + 1)
    assert stream.bytes == num_bytes


def test_a_batch_larger_than_the_ring_gets_a_larger_one(tmp_path):
    write(tmp_path / "expected", SPEC)
    stream = LateStream(0)
    extract(tmp_path / "ring", Ring(stream, 1000))
    assert stream.bytes >= 1440
    assert files(tmp_path / "ring") == files(tmp_path / "expected")


@pytest.mark.parametrize("make", [Direct, lambda: Ring(LateStream(0.001), 1600)])
def test_an_error_of_the_writing_thread_ends_whoever_waits_for_room(tmp_path, make):
    def spoiled(block: np.ndarray) -> np.ndarray:
        block[..., 5] = np.nan
        return block

    with pytest.raises(StoreError, match=r"nan in hidden layer 0, train sequence 0, position 0, channel 5"):
        extract(tmp_path / "nan", make(), change=spoiled)
    assert not list(tmp_path.rglob("*.partial"))
