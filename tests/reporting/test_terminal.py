"""Tables in terminals of every width: each number that is shown is shown whole."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lftpipe.reporting.terminal import Column, FittedTable, print_plainly

NAMES = ("method", "block", "k", "KL_x", "NMSE", "w/o 1st", "KL", "PPL")
ROWS = [
    ["teacher", "-", "-", "-", "-", "-", "-", "40.06"],
    [
        "12-20-with-a-long-name-seed0",
        "12:20",
        "1",
        "1.204e+04",
        "0.1532",
        "0.1527",
        "0.3059",
        "79.04",
    ],
    ["skip layers 12-19", "12:20", "-", "1.122e-01", "0.2714", "0.2703", "0.6596", "1.204e+04"],
]


def table(**options) -> FittedTable:
    columns = [
        Column(
            name,
            "left" if name == "method" else "right",
            folds=name == "method",
            needed=name in ("method", "k", "KL", "PPL"),
        )
        for name in NAMES
    ]
    return FittedTable(columns, ROWS, **options)


def shown(renderable, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@given(st.integers(8, 200))
@settings(deadline=None)
def test_no_number_is_cut_at_any_width(width):
    text = shown(table(title="pythia", caption="written", complete="results.md has them"), width)
    assert max(map(len, text.splitlines())) <= width
    left_out = re.search(r"too narrow for (.*): results", " ".join(text.split()))
    gone = set(left_out[1].split(", ")) if left_out else set()
    if width >= 12:  # below, the rows of the list themselves are folded
        words = text.replace("\n", " ").split()
        for row in ROWS:
            for name, cell in zip(NAMES, row, strict=True):
                assert name in gone or name == "method" or cell in words
    assert "…" not in text


def test_columns_go_whole_and_with_a_word_the_last_first():
    assert "too narrow" not in shown(table(), 120)
    assert "too narrow for w/o 1st: --json has all" in shown(table(), 66)
    assert "too narrow for KL_x, NMSE, w/o 1st: --json" in " ".join(shown(table(), 44).split())
    assert "PPL: 1.204e+04" in shown(table(), 20)  # row by row


def test_without_a_terminal_no_line_is_folded(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_plainly(table())
    assert "12-20-with-a-long-name-seed0" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    print_plainly(table())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert all(line == line.rstrip() for line in lines)  # nor padded


@pytest.mark.parametrize("width", [10, 40, 100])
def test_names_and_values_stand_under_each_other(width):
    facts = FittedTable(
        [Column("", "left"), Column("", "left", folds=True)], [["corpus", "python"], ["k", "3"]]
    )
    words = shown(facts, width).replace(":", " ").split()
    assert words == ["corpus", "python", "k", "3"]
