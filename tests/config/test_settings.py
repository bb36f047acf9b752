import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.config.layers import parse_block, parse_layers
from lftpipe.config.settings import Common, EvaluateSettings, TrainSettings, to_plain
from lftpipe.errors import SettingsError


@given(st.integers(1, 40))
def test_all_layers_are_all_states(num_states):
    assert parse_layers("all", num_states) == tuple(range(num_states))


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_list_of_layers_is_sorted_and_without_repeats(layers):
    text = ",".join(map(str, [*layers, *layers]))
    assert parse_layers(text, 31) == tuple(sorted(layers))


def test_a_range_of_layers_is_half_open():
    assert parse_layers("0:13", 25) == tuple(range(13))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9:4", "layers 9:4 / expected: a half-open range m:n with m < n / do: try 4:9"),
        ("4:4", "half-open range m:n with m < n / do: try 4:5"),
        ("0:26", "layers 0:26 / expected: states from 0 to 24 / do: name states below 25"),
        ("25", "layers 25 / expected: states from 0 to 24"),
        ("", "layers '' / expected: all, a list 6,18 or a range 0:13"),
        ("six", "layers 'six' / expected: all, a list"),
        ("6,", "expected: all, a list"),
        ("-1", "expected: all, a list"),
    ],
)
def test_layers_that_make_no_sense_are_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_layers(text, 25)


def test_a_block_is_half_open_and_may_reach_the_last_layer():
    assert parse_block("6:12", 24) == (6, 12)
    assert parse_block("0:24", 24) == (0, 24)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9:4", "block 9:4 / expected: m:n with m < n / do: try 4:9"),
        ("6:6", "block 6:6 / expected: m:n with m < n / do: try 6:7"),
        ("6:25", "block 6:25 / expected: n at most 24, the teacher's layers"),
        ("6-12", "block '6-12' / expected: m:n, as in 6:12"),
        ("all", "block 'all' / expected: m:n"),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_block(text, 24)


@pytest.mark.parametrize("kind", Common.__subclasses__())
def test_settings_are_frozen_and_plain(kind):
    settings = kind()
    with pytest.raises(dataclasses.FrozenInstanceError, match="seed"):
        settings.seed = 1
    assert {type(value) for value in to_plain(settings).values()} <= {str, int, float, bool, list}


def test_the_workspace_is_the_one_of_the_environment(monkeypatch):
    monkeypatch.setenv("LFTPIPE_WORKSPACE", "elsewhere")
    assert str(TrainSettings().workspace) == "elsewhere"
    monkeypatch.delenv("LFTPIPE_WORKSPACE")
    assert str(TrainSettings().workspace) == "data"


def test_the_contract_holds_for_what_is_left_out():
    train = TrainSettings()
    assert (train.block, train.objective, train.walk_steps, train.from_teacher) == ("auto", "fw", 3, False)
    assert (EvaluateSettings().k, EvaluateSettings().skips) == ((1, 2, 3, 8), (1, 2, 3))
