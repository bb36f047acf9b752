import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.base.errors import SettingsError
from lftpipe.config import settings as settings_module
from lftpipe.config.layers import parse_block, parse_layers
from lftpipe.config.settings import (
    EvaluateSettings,
    ExtractSettings,
    GenerateSettings,
    TrainSettings,
    VerifySettings,
    to_json,
)


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


KINDS = [getattr(settings_module, name) for name in settings_module.__all__ if name.endswith("Settings")]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_frozen_and_json(kind):
    settings = kind()
    with pytest.raises(dataclasses.FrozenInstanceError, match="workspace"):
        settings.workspace = 1
    assert {type(value) for value in to_json(settings).values()} <= {str, int, float, bool, list}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_panel_is_of_its_command(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    listed = [name for panel in kind.PANELS.values() for name in panel.split()]
    assert set(listed) <= names
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainSettings, {"tokens": 0}, "--tokens 0 / expected: at least 1 / do: raise --tokens"),
        (
            TrainSettings,
            {"tokens": 10**30},
            "--tokens 10{30} / expected: at most 1000000000000000 / do: lower",
        ),
        (TrainSettings, {"learning_rate": -1.0}, "--learning-rate -1.0 / expected: at least 0"),
        (TrainSettings, {"learning_rate": math.inf}, "--learning-rate inf / expected: a finite number"),
        (TrainSettings, {"replace": 1.5}, "--replace 1.5 / expected: at most 1 / do: lower --replace"),
        (TrainSettings, {"seed": -1}, "--seed -1 / expected: at least 0"),
        (TrainSettings, {"seed": 2**64}, "--seed 18446744073709551616 / expected: less than 4294967296"),
        (TrainSettings, {"walk_steps": 0}, "--walk-steps 0 / expected: at least 1"),
        (TrainSettings, {"batch_tokens": 10**12}, "--batch-tokens 10{12} / expected: at most 16777216"),
        (TrainSettings, {"device": "meta"}, "--device meta / expected: cpu, cuda, cuda:N or mps"),
        (TrainSettings, {"run": "a\nb"}, "expected: one line of text, without control characters"),
        (TrainSettings, {"run": "\udcff"}, "expected: one line of text, without control characters"),
        (
            TrainSettings,
            {"store": Path("a\0b")},
            "given: --store a.b / expected: a path in UTF-8 without control characters",
        ),
        (TrainSettings, {"store": Path("b" * 256)}, "expected: names of at most 255 bytes"),
        (TrainSettings, {"store": Path("b/" * 3000)}, "do: choose a shorter path"),
        (TrainSettings, {"sede": 3}, "'sede' in the settings / expected: one of alpha, batch_tokens"),
        (EvaluateSettings, {"k": (1, 0)}, "--k 0 / expected: at least 1"),
        (EvaluateSettings, {"k": (10**9,)}, "--k 1000000000 / expected: at most 1000 / do: lower --k"),
        (ExtractSettings, {"context": 1}, "--context 1 / expected: at least 2"),
        (GenerateSettings, {"temperature": 1e-45}, "--temperature 1e-45 / expected: 0, or at least 0.001"),
        (GenerateSettings, {"temperature": math.nan}, "--temperature nan / expected: a finite number"),
        (VerifySettings, {"target": Path("c" * 256)}, "given: c{79}… / expected: names of at most 255"),
        (GenerateSettings, {"prompt": "\udcff"}, "--prompt .* / expected: a text in UTF-8"),
    ],
)
def test_what_is_out_of_range_is_refused_when_settings_are_made(kind, values, message):
    with pytest.raises(SettingsError, match=message):
        kind(**values)
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(kind(), **values) if "sede" not in values else kind(**values)


def test_python_callers_may_write_lists_and_texts():
    settings = EvaluateSettings(k=[1, 2], store="a/b", runs=["x"])  # pyright: ignore[reportArgumentType]
    assert (settings.k, settings.store, settings.runs) == ((1, 2), Path("a/b"), ("x",))


def test_the_workspace_is_the_one_of_the_environment(monkeypatch):
    monkeypatch.setenv("LFTPIPE_WORKSPACE", "elsewhere")
    assert str(TrainSettings().workspace) == "elsewhere"
    monkeypatch.delenv("LFTPIPE_WORKSPACE")
    assert str(TrainSettings().workspace) == "data"


def test_the_contract_holds_for_what_is_left_out():
    train = TrainSettings()
    assert (train.block, train.objective, train.walk_steps, train.from_teacher) == ("auto", "fw", 3, False)
    assert (EvaluateSettings().k, EvaluateSettings().skips) == ((1, 2, 3, 8), (1, 2, 3))
