"""Training beside `extract --rolling`: a disk smaller than the cache, and the weights of a whole store."""

from pathlib import Path

import pytest
from conftest import CONTEXT
from rolling_stores import CAP, SHARD, beside, extraction, text_for
from training_runs import assert_same_weights, short_run

from lftpipe.stages.extract import extract
from lftpipe.stages.train import train

#: Sequences of a window: two shards of four.
WINDOW = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return text_for(tmp_path_factory.mktemp("rolling") / "text")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teachers, text) -> Path:
    """All states of the same sequences."""
    settings = extraction(tmp_path_factory.mktemp("whole"), teachers["neox"], text, rolling=None)
    return Path(extract(settings)["store"])


def test_weights_equal_those_of_a_whole_store_with_the_same_windows(whole, teachers, text, tmp_path):
    run = {"tokens": 25 * 4 * CONTEXT, "batch_tokens": 4 * CONTEXT}  # two epochs and a half
    with beside(extraction(tmp_path, teachers["neox"], text)) as producer:
        train(short_run(producer.store, tmp_path / "rolling", **run))
    told = producer.join()["rolling"]
    train(short_run(whole, tmp_path / "whole", window=WINDOW, **run))
    assert_same_weights(tmp_path / "rolling/run", tmp_path / "whole/run")
    assert told["made_again"] >= 10
    assert told["dropped"] >= 20
    assert told["peak_bytes"] <= CAP
    assert SHARD < producer.most <= CAP
