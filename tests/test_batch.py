"""One type of batch: what is read, trained on, scored and extracted says the same of the same sequences."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, extracted
from training_runs import teacher_of

from lftpipe.data.batches import BatchFields, BatchOrder, BatchReader, make_batch
from lftpipe.data.teacher_reader import LiveReader
from lftpipe.store import Store, batch_sequences
from lftpipe.teacher.layers import load_layer

FIELDS = BatchFields((1, 3), (1, 2), True)
ORDER = BatchOrder(batch_size=5, seed=3, num_sequences=40)


@pytest.fixture(scope="module")
def store(tmp_path_factory, teachers, text_folder) -> Store:
    folder = tmp_path_factory.mktemp("batch")
    return Store.open(extracted(folder, teachers["neox"], text_folder, dtype="float32", logits=4))


@pytest.fixture(scope="module")
def reader(store) -> BatchReader:
    return BatchReader(store, teacher_of(store), "cpu")


def test_positions_restart_with_each_segment_and_only_there():
    document = np.array([[7, 7, 7, 9, 9], [1, 2, 2, 2, 2]], np.int32)
    batch = make_batch(np.zeros((2, 5), np.int32), document, torch.device("cpu"))
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch.first_of_segment.sum().item() == 4
    assert len(batch) == 2


def test_a_batch_holds_what_was_asked_for_of_the_sequences_of_its_step(store, reader):
    batches = reader.shuffled(FIELDS, ORDER, 4)
    for step in (4, 5):
        batch = next(batches)
        rows = batch_sequences(40, 5, 3, step)
        assert batch.step == step
        assert batch.tokens.numpy().tolist() == store.tokens("train", rows).tolist()
        for layer in (1, 3):
            assert batch.states[layer].numpy().tolist() == store.read("train", layer, rows).tolist()
        for layer in (1, 2):
            expected = store.read("train", layer, rows, array="attention")
            assert batch.attention[layer].numpy().tolist() == expected.tolist()
        assert batch.logits is not None
        for ours, theirs in zip(batch.logits, store.logits("train", rows), strict=True):
            assert ours.numpy().tolist() == theirs.tolist()


def test_an_earlier_batch_keeps_its_states_when_the_next_one_is_read(reader):
    batches = reader.shuffled(FIELDS, ORDER, 0)
    first = next(batches)
    before = {layer: state.clone() for layer, state in first.states.items()}
    for _ in range(6):
        next(batches)
    torch.testing.assert_close(dict(first.states), before, rtol=0, atol=0)


def test_every_process_takes_its_part_of_a_batch(reader):
    whole = next(reader.shuffled(FIELDS, ORDER, 2))
    part = slice(1, None, 2)
    mine = next(reader.shuffled(FIELDS, BatchOrder(5, 3, 40, part), 2))
    assert mine.part == part
    assert torch.equal(mine.states[3], whole.states[3][part])
    assert torch.equal(mine.position_ids, whole.position_ids[part])


def test_a_live_batch_is_the_cached_one(store, reader):
    cached = next(reader.shuffled(FIELDS, ORDER, 1))
    live = next(LiveReader(store, teacher_of(store), "cpu").shuffled(FIELDS, ORDER, 1))
    assert torch.equal(live.tokens, cached.tokens)
    assert live.step == cached.step
    torch.testing.assert_close(live.states, cached.states)
    torch.testing.assert_close(live.attention, cached.attention)


def test_the_teachers_layers_in_a_batch_s_context_give_its_next_state(store, reader):
    """States, positions, mask and rotary embedding go together, across segments too."""
    batch = reader.read("train", range(2, 8), BatchFields((1, 2)))
    assert batch.first_of_segment[:, 1:].any()
    with torch.no_grad():
        reached = load_layer(teacher_of(store), 1)(batch.states[1], batch.context)
    torch.testing.assert_close(reached, batch.states[2], rtol=1e-4, atol=1e-4)


def test_a_batch_for_the_whole_teacher_has_no_context_of_its_own():
    zeros = np.zeros((1, CONTEXT), np.int32)
    with pytest.raises(AssertionError, match="for the whole teacher"):
        _ = make_batch(zeros, zeros, torch.device("cpu")).context


def test_fields_add_up():
    both = BatchFields((1, 3), (), False) | BatchFields((0, 3), (2,), True)
    assert both == BatchFields((0, 1, 3), (2,), True)
