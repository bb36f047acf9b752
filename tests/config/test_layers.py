"""Blocks that one student can have together, and those that it can't."""

import itertools

import pytest

from lftpipe.base.errors import SettingsError
from lftpipe.config.layers import check_apart


def accepted(blocks: list[tuple[int, int]], num_layers: int | None = None) -> bool:
    try:
        check_apart(blocks, "--joint with blocks", *([] if num_layers is None else [num_layers]))
    except SettingsError:
        return False
    return True


@pytest.mark.parametrize("num_layers", [None, 3])
def test_just_those_blocks_are_accepted_of_which_no_layer_is_in_two_and_that_ascend(num_layers):
    every = list(itertools.product(range(5), repeat=2))
    for count in range(3):
        for blocks in itertools.product(every, repeat=count):
            layers = [layer for block in blocks for layer in range(*block)]
            whole = all(m < n <= (num_layers or n) for m, n in blocks)
            ascend = whole and layers == sorted(set(layers))
            assert accepted(list(blocks), num_layers) == ascend, blocks


@pytest.mark.parametrize("blocks", [[(0, 3), (2, 4)], [(3, 4), (0, 3)], [(1, 1)], [(3, 2)], [(0, 2), (0, 2)]])
def test_other_blocks_are_refused_by_name(blocks):
    shown = ", ".join(f"{m}:{n}" for m, n in blocks)
    with pytest.raises(SettingsError, match=f"--joint with blocks {shown} / expected: blocks in order"):
        check_apart(blocks, "--joint with blocks")


def test_blocks_end_with_the_teacher():
    with pytest.raises(SettingsError, match="that do not overlap, inside 8 layers"):
        check_apart([(0, 3), (5, 9)], "a student with blocks", 8)
