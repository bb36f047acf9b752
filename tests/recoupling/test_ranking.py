"""The rule by which blocks are chosen."""

from dataclasses import replace

import pytest
from fake_maps import make_map

from lftpipe.base.errors import SettingsError
from lftpipe.recoupling.ranking import best_block, block_length, rank_blocks, ranking
from lftpipe.results.recoupling import Ranked


def a_map(layers, **figures):
    """A map whose figures are 0 but for the pairs named: `ratio={(0, 2): 0.5}`."""
    zeros = {key: {} for key in ("ratio", "relative_gap", "relative_displacement")}
    return make_map(layers, 4, **zeros | figures)


def test_the_lowest_ratio_wins():
    ratios = {(0, 2): 0.5, (1, 3): 0.1, (2, 4): 0.3}
    assert rank_blocks(a_map(5, ratio=ratios), 2) == [(1, 3), (2, 4), (0, 2)]


def test_equal_ratios_are_ranked_by_the_gap_then_by_displacement():
    ratios = dict.fromkeys([(0, 2), (1, 3), (2, 4)], 0.2)
    gaps = {(0, 2): 0.10, (1, 3): 0.02, (2, 4): 0.02}
    steps = {(0, 2): 0.1, (1, 3): 0.4, (2, 4): 0.3}
    recoupling = a_map(5, ratio=ratios, relative_gap=gaps, relative_displacement=steps)
    assert rank_blocks(recoupling, 2) == [(2, 4), (1, 3), (0, 2)]


def test_one_token_in_two_thousand_does_not_outweigh_displacement():
    steps = {(0, 2): 0.9, (1, 3): 0.1, (2, 4): 0.5}
    recoupling = a_map(5, ratio={(1, 3): 1 / 2048}, relative_gap={(1, 3): 1e-6}, relative_displacement=steps)
    assert rank_blocks(recoupling, 2)[0] == (1, 3)


def test_all_else_equal_the_earliest_block_comes_first():
    assert rank_blocks(a_map(6), 3) == [(0, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize(
    ("replace", "num_layers", "length"),
    [(0.25, 24, 6), (0.5, 24, 12), (0.01, 24, 1), (1.0, 6, 6), (0.25, 6, 2)],
)
def test_a_fraction_is_rounded_to_whole_layers(replace, num_layers, length):
    assert block_length(num_layers, replace) == length


def test_the_best_block_has_the_length_asked_for():
    ratios = {(m, n): 0.5 for m in range(25) for n in range(m + 1, 25)} | {
        (6, 12): 0.1,
        (6, 18): 0.2,
        (7, 8): 0.0,
    }
    recoupling = a_map(25, ratio=ratios)
    assert best_block(recoupling, 24, 0.25) == (6, 12)
    assert best_block(recoupling, 24, 0.5) == (6, 18)


def test_states_that_are_not_on_the_map_are_no_blocks():
    recoupling = a_map([6, 12, 18])
    assert rank_blocks(recoupling, 6) == [(6, 12), (12, 18)]
    with pytest.raises(SettingsError, match=r"block of 4 of 24 layers.*states 6, 12, 18.*pass --block"):
        best_block(recoupling, 24, 1 / 6)


def test_the_ranking_lists_every_length_there_is():
    table = ranking(a_map([0, 2, 4]), 4)
    assert table == [
        Ranked(length=2, fraction=0.5, blocks=[(0, 2), (2, 4)]),
        Ranked(length=4, fraction=1.0, blocks=[(0, 4)]),
    ]


def test_a_figure_that_the_map_lacks_cannot_rank():
    recoupling = replace(a_map(3, influence={(0, 1): 0.2, (1, 2): 0.1}), probe_residual=None)
    assert rank_blocks(recoupling, 1, "influence") == [(1, 2), (0, 1)]
    with pytest.raises(SettingsError, match=r"map without probe_residual .*recouple --rank-by probe --force"):
        rank_blocks(recoupling, 1, "probe")
