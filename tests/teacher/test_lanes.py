"""Batches side by side: results in order, each by one thread, whatever their number."""

import threading
from collections.abc import Iterator

import pytest
import torch

from lftpipe.teacher.thread_pool import Lanes


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items_and_items_that_are_not_there_are_skipped(count):
    waits = [0.03, 0.0, 0.02, 0.01] * 3

    def slow(_: int, item: int) -> int:
        threading.Event().wait(waits[item])
        return item

    items = [each for item in range(len(waits)) for each in (item, None)]
    with Lanes(count) as lanes:
        assert list(lanes.map(slow, items)) == list(range(len(waits)))


def test_no_two_items_are_in_one_lane_at_a_time_and_all_lanes_have_work():
    busy, seen, together = set(), set(), threading.Barrier(3)

    def work(lane: int, _: int) -> None:
        assert lane not in busy
        busy.add(lane)
        seen.add(lane)
        together.wait(10)
        busy.remove(lane)

    with Lanes(3) as lanes:
        list(lanes.map(work, range(9)))
    assert seen == {0, 1, 2}


def test_who_has_nothing_to_give_for_now_gets_what_is_computed_handed_out():
    """A producer that waits for room gets it only once what is computed has been written."""
    handed_out = []

    def items() -> Iterator[int | None]:
        yield 1
        asked = 0
        while not handed_out:
            asked += 1
            assert asked < 10_000, "the result is held back"
            threading.Event().wait(0.001)
            yield None
        yield 2

    with Lanes(4) as lanes:
        handed_out.extend(lanes.map(lambda _, item: item, items()))
    assert handed_out == [1, 2]


def test_lanes_can_be_entered_again_and_are_as_many_as_before():
    lanes = Lanes(4)
    with lanes:
        assert list(lanes.map(lambda lane, _: lane, range(1))) == [0]
    together = threading.Barrier(4)
    with lanes:
        assert set(lanes.map(lambda lane, _: (together.wait(10), lane)[1], range(4))) == set(range(4))


def test_an_error_is_raised_and_nothing_more_is_begun():
    begun = []

    def fail(_: int, item: int) -> None:
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"), Lanes(2) as lanes:
        list(lanes.map(fail, range(100)))
    assert len(begun) < 10


def test_products_in_a_lane_are_one_threads_and_the_caller_gets_its_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Lanes(2) as lanes:
            assert set(lanes.map(lambda *_: torch.get_num_threads(), range(8))) == {1}
        assert torch.get_num_threads() == 3
        with Lanes(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
