"""Blocks that one student can have together, and those that it can't."""

import pytest

from lftpipe.config.layers import check_apart
from lftpipe.errors import SettingsError


@pytest.mark.parametrize("blocks", [[], [(0, 3)], [(0, 3), (3, 4)], [(1, 2), (5, 9)]])
def test_blocks_in_order_that_do_not_overlap_are_accepted(blocks):
    check_apart(blocks, "--joint with blocks")
    check_apart(blocks, "--joint with blocks", 9)


@pytest.mark.parametrize("blocks", [[(0, 3), (2, 4)], [(3, 4), (0, 3)], [(1, 1)], [(3, 2)], [(0, 2), (0, 2)]])
def test_other_blocks_are_refused_by_name(blocks):
    shown = ", ".join(f"{m}:{n}" for m, n in blocks)
    with pytest.raises(SettingsError, match=f"--joint with blocks {shown} / expected: blocks in order"):
        check_apart(blocks, "--joint with blocks")


def test_blocks_end_with_the_teacher():
    with pytest.raises(SettingsError, match="that do not overlap, inside 8 layers"):
        check_apart([(0, 3), (5, 9)], "a student with blocks", 8)
