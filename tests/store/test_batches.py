"""Batches are shuffled over the split, a function of seed and step, read ahead, safe in other processes."""

import itertools
import multiprocessing
import threading

import numpy as np
import pytest
from fake_states import make_spec, states, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.base.errors import StoreError
from lftpipe.store import Store, batch_sequences

SPEC = make_spec()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("batches") / "states.zarr"
    write(path, SPEC)
    return Store.open(path)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32), st.integers(1, 4))
def test_every_epoch_shows_every_sequence_once(count, batch_size, seed, epochs):
    steps = -(-epochs * count // batch_size)
    stream = np.concatenate([batch_sequences(count, batch_size, seed, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ():
    one, two = (batch_sequences(100, 100, 0, step) for step in (0, 1))
    assert (one != two).any()
    assert (one != batch_sequences(100, 100, 1, 0)).any()


def take(store: Store, count: int, **options):
    """Copies, because a batch's memory is used again."""
    stream = store.batches("train", [0, 3], batch_size=4, seed=7, **options)
    return [
        (
            batch.step,
            batch.sequences,
            {layer: array.copy() for layer, array in batch.states.items()},
            batch.tokens,
        )
        for batch in itertools.islice(stream, count)
    ]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_hold_the_states_and_tokens_of_their_sequences(store, prefetch):
    for step, (own, wanted, read, ids) in enumerate(take(store, 9, prefetch=prefetch)):
        assert own == step
        np.testing.assert_array_equal(wanted, batch_sequences(10, 4, 7, step))
        for layer in (0, 3):
            want = states(SPEC, "train", "hidden", layer, wanted.tolist()).astype(np.float16)
            np.testing.assert_array_equal(read[layer], want)
        np.testing.assert_array_equal(ids, tokens(SPEC, "train")[0][wanted])


def test_a_run_resumed_at_a_step_gets_the_same_batches(store):
    for (step, wanted, read, _), (again, same, reread, _) in zip(
        take(store, 9)[5:], take(store, 4, start_step=5), strict=True
    ):
        assert step == again
        np.testing.assert_array_equal(wanted, same)
        np.testing.assert_array_equal(read[3], reread[3])


def test_memory_is_used_again_and_the_thread_ends(store):
    stream = store.batches("train", [0], batch_size=2, seed=0, prefetch=2)
    places = {id(batch.states[0]) for batch in itertools.islice(stream, 20)}
    assert len(places) == 4
    assert any(thread.name == "lftpipe-batches" for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == "lftpipe-batches" for thread in threading.enumerate())


def test_attention_without_tokens(store):
    batch = next(
        store.batches("validation", [], attention_layers=[2], batch_size=5, seed=0, with_tokens=False)
    )
    assert batch.tokens is None
    want = states(SPEC, "validation", "attention", 2, batch.sequences.tolist()).astype(np.float16)
    np.testing.assert_array_equal(batch.attention[2], want)


def test_errors_of_the_thread_reach_the_reader(tmp_path):
    write(tmp_path / "states.zarr", SPEC)
    stream = Store.open(tmp_path / "states.zarr").batches("train", [0], batch_size=10, seed=0)
    for file in (tmp_path / "states.zarr/train/hidden").glob("c.*"):
        file.unlink()
    with pytest.raises(StoreError, match=r"hidden of train, shard .*No such file"):
        next(stream)


def test_batches_that_cannot_be(store):
    with pytest.raises(StoreError, match="hidden of layer 1 is not in"):
        store.batches("train", [1], batch_size=2, seed=0)
    for options in ({"batch_size": 0}, {"prefetch": -1}, {"seed": -1}, {"start_step": -1}):
        with pytest.raises(
            ValueError, match=f"no such batches of 10 train sequences: .*{next(iter(options))}=-?"
        ):
            store.batches("train", [0], **{"batch_size": 2, "seed": 0, **options})


def _read_elsewhere(store: Store, results) -> None:
    results.put([(batch[1].tolist(), batch[2][3].sum(dtype=float)) for batch in take(store, 6)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_read_at_once_while_their_parent_does(store, method):
    """The parent's files are open and its thread is reading when the others begin."""
    context = multiprocessing.get_context(method)
    stream = store.batches("train", [0, 3], batch_size=4, seed=7)
    next(stream)
    results = context.SimpleQueue()
    others = [context.Process(target=_read_elsewhere, args=(store, results)) for _ in range(2)]
    for other in others:
        other.start()
    want = [(wanted.tolist(), read[3].sum(dtype=float)) for _, wanted, read, _ in take(store, 6)]
    assert [results.get() for _ in others] == [want, want]
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    next(stream)
    stream.close()


def _go_on(stream, results) -> None:
    try:
        next(stream)
    except RuntimeError as error:
        results.put(str(error))


def test_batches_begun_before_a_fork_are_refused_after_it(store):
    context = multiprocessing.get_context("fork")
    stream = store.batches("train", [0], batch_size=4, seed=7)
    next(stream)
    results = context.SimpleQueue()
    other = context.Process(target=_go_on, args=(stream, results))
    other.start()
    assert "belong to the process that began them" in results.get()
    other.join(60)
    stream.close()


@pytest.mark.parametrize(("count", "window"), [(40, 8), (38, 8), (5, 8), (9, 1)])
def test_windows_are_seen_in_order_and_shuffled_within(count, window):
    steps = [batch_sequences(count, 4, 3, step, window) for step in range(count)]
    epochs = np.concatenate(steps).reshape(4, count)
    for epoch in epochs:
        for first in range(0, count, window):
            part = epoch[first : first + window].tolist()
            assert sorted(part) == list(range(first, min(first + window, count)))
    if window > 1:
        assert epochs[0].tolist() != epochs[1].tolist() != list(range(count))
