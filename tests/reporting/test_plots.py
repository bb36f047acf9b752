"""Figures: what is drawn of what."""

from pathlib import Path

from matplotlib.figure import Figure

from lftpipe.reporting import plots


def test_runs_without_validation_nmse_stay_in_figure_4(monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    watched = [{"tokens": 64, "nmse": 0.5, "validation_nmse": 0.6}, {"tokens": 128, "nmse": 0.4}]
    plain = [{"tokens": 64, "nmse": 0.7}, {"tokens": 128, "nmse": 0.3}]
    plots.draw_training({"watched": watched, "plain": plain, "healed": [{"tokens": 64}]}, [], Path("unused"))
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert lines == {"watched": [0.6], "plain (training batches)": [0.7, 0.3]}


def test_figure_4_without_validation_shows_training_batches(monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.draw_training({"a": [{"tokens": 1, "nmse": 0.5}]}, [], Path("unused"))
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["a"]
    assert figures[0].axes[0].get_ylabel() == "NMSE on training batches"
