"""The map's pictures, drawn from maps of several sizes."""

from itertools import combinations

import matplotlib.image
import pytest
from fake_maps import make_map

from lftpipe.reporting.plots import draw_recoupling


@pytest.mark.parametrize("size", [2, 13, pytest.param(33, marks=pytest.mark.slow)])
def test_the_figure_grows_so_that_cells_stay_readable(tmp_path, size):
    path = tmp_path / "map.png"
    draw_recoupling(make_map(size), [(0, 1), (0, size - 1)][: size - 1], path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert min(height, width) > 0.25 * 150 * size  # inches a cell, at 150 dots an inch
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_a_map_can_be_drawn_without_transport_or_with_many(tmp_path):
    draw_recoupling(make_map(4), [], tmp_path / "none.png")
    draw_recoupling(make_map(4), list(combinations(range(4), 2)), tmp_path / "many.png")
    assert (
        matplotlib.image.imread(tmp_path / "none.png").shape[1]
        < matplotlib.image.imread(tmp_path / "many.png").shape[1]
    )


def test_names_are_no_mathematics(tmp_path):
    draw_recoupling(make_map(3, teacher="$\\frac{$"), [(0, 1)], tmp_path / "map.png")
    assert b"made by lftpipe" in (tmp_path / "map.png").read_bytes()
