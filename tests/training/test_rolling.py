"""Training beside `extract --rolling`: a disk smaller than the cache, and the weights of a whole store."""

import random
import signal
import time
from pathlib import Path

import pytest
from conftest import CONTEXT
from rolling_stores import CAP, SHARD, Disk, Restarted, beside, extraction, text_for, training_shards
from training_runs import assert_same_weights, change, short_run, stop_before
from waiting import wait_until

from lftpipe.base.errors import LftpipeError, SettingsError, StoreError
from lftpipe.commands import heal, info, recouple, sweep, verify
from lftpipe.commands.extract import extract, summary
from lftpipe.commands.train import train
from lftpipe.config.settings import (
    HealSettings,
    InfoSettings,
    RecoupleSettings,
    SweepSettings,
    VerifySettings,
)
from lftpipe.store import Store, registered

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
    assert SHARD < producer.disk.most() <= CAP
    assert not registered(producer.store)


def test_runs_that_began_apart_end_alike_and_the_late_one_comes_first(whole, teachers, text, tmp_path):
    run = {"tokens": 10 * 4 * CONTEXT, "batch_tokens": 4 * CONTEXT}
    with beside(extraction(tmp_path, teachers["neox"], text)) as producer:
        first = short_run(producer.store, tmp_path / "first", **run)
        with pytest.MonkeyPatch.context() as patch:
            stop_before(patch, 7)
            with pytest.raises(KeyboardInterrupt):
                train(first)
        ((file, stands),) = registered(producer.store).items()
        assert (stands.position, stands.end) == (24, 40)  # its checkpoint as it entered window 3
        train(short_run(producer.store, tmp_path / "late", seed=1, **run))
        assert list(registered(producer.store)) == [file]  # the producer goes on for the first one
        train(change(first, resume=True))
    told = producer.join()
    assert producer.result is not None
    assert f"{told['rolling']['dropped']} dropped; never more than" in summary(producer.result)
    for seed, name in enumerate(("first", "late")):
        train(short_run(whole, tmp_path / f"whole-{name}", window=WINDOW, seed=seed, **run))
        assert_same_weights(tmp_path / f"{name}/run", tmp_path / f"whole-{name}/run")
    assert told["rolling"]["made_again"] > 0
    assert producer.disk.most() <= CAP


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_killed_on_both_sides_the_weights_are_the_same(kills, whole, teachers, text, tmp_path):
    settings = extraction(tmp_path, teachers["neox"], text)
    store = tmp_path / "neox/states.zarr"
    run = {"tokens": 20 * 4 * CONTEXT, "batch_tokens": 4 * CONTEXT, "resume": True}
    disk = Disk(store)
    disk.start()
    producer = Restarted(lambda: extract(settings))
    manifest = store / "manifest.json"
    wait_until(lambda: manifest.exists() or not producer.running, "the producer's first window")
    trainer = Restarted(lambda: train(short_run(store, tmp_path / "rolling", **run)))
    rng, killed = random.Random(kills), 0
    for number, moment in enumerate(sorted(rng.uniform(0, 70) for _ in range(2 * kills))):
        wait_until(
            lambda moment=moment: (
                not trainer.running
                or max((r.position for r in registered(store).values()), default=0) >= moment
            ),
            f"the training to come to sequence {moment:.0f}",
        )
        time.sleep(rng.uniform(0, 0.3))
        killed += (trainer, producer)[number % 2].kill()
    assert trainer.join() == 0
    assert producer.end(15) in (0, -signal.SIGKILL)
    assert killed > kills
    train(short_run(whole, tmp_path / "whole", window=WINDOW, **run))
    assert_same_weights(tmp_path / "rolling/run", tmp_path / "whole/run")
    left, wanted = training_shards(store), training_shards(whole)
    assert left
    assert left == {name: wanted[name] for name in left}
    assert disk.most() <= CAP + 2 * SHARD  # what a killed run had open may be there for a moment


@pytest.fixture
def rolling(teachers, text, tmp_path) -> Path:
    """A rolling store whose producer was ended after a run of one step."""
    with beside(extraction(tmp_path, teachers["neox"], text)) as producer:
        train(short_run(producer.store, tmp_path / "one", tokens=4 * CONTEXT))
    producer.join()
    return producer.store


@pytest.mark.parametrize("runs", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_of_one_step_ends_its_producer_however_short_it_is(runs, rolling, teachers, text, tmp_path):
    for number in range(runs):
        (rolling / "readers/left").unlink()  # as if no run had ever come
        with beside(extraction(tmp_path, teachers["neox"], text)) as producer:
            train(short_run(rolling, tmp_path / str(number), tokens=4 * CONTEXT))
        producer.join()
        producer.disk.most()  # nobody watches it any more


def test_a_producer_that_begins_after_the_last_run_has_left_does_not_wait_for_it(rolling, teachers, text):
    assert not registered(rolling)
    with beside(extraction(rolling.parents[1], teachers["neox"], text)) as producer:
        producer.join()


def test_a_run_between_two_looks_of_the_producer_was_seen(rolling, teachers, text, tmp_path, monkeypatch):
    """The run registers and leaves after the first look, and before the second."""
    (rolling / "readers/left").unlink()
    looks = []

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 1:
            train(short_run(rolling, tmp_path / "between", tokens=4 * CONTEXT))
        assert len(looks) < 10, "the producer waits for a run that has left"

    monkeypatch.setattr("lftpipe.extraction.rolling.time.sleep", sleep)
    extract(extraction(tmp_path, teachers["neox"], text))
    assert looks


def test_what_needs_the_whole_store_says_so_in_one_line(rolling, tmp_path):
    assert Store.open(rolling).spec.rolling == 2
    run = short_run(rolling, tmp_path / "refused")
    for given, what in (
        ({"hold_back": 0.1}, "--hold-back 0.1 on the rolling store"),
        ({"init": "readout"}, "--init readout on the rolling store"),
        ({"loss_scale": "channel"}, "--loss-scale channel on the rolling store"),
        ({"objective": "linear"}, "--objective linear on the rolling store"),
        ({"block": "auto"}, "--block auto on the rolling store"),
        ({"window": 9}, "--window 9 on a rolling store / expected: its own windows, of 8 sequences"),
        ({"batch_tokens": 5 * CONTEXT}, f"windows of 8 sequences / expected: at most {4 * CONTEXT}"),
    ):
        with pytest.raises(LftpipeError, match=what):
            train(change(run, **given))
    assert not Path(str(run.run)).exists()
    made = str(tmp_path / "one/run")
    for act in (
        lambda: recouple.recouple(RecoupleSettings(store=rolling)),
        lambda: sweep.sweep(SweepSettings(store=rolling, lengths=(1,))),
        lambda: heal.heal(HealSettings(store=rolling, target=made)),
    ):
        with pytest.raises(StoreError, match=r"on the rolling store .* / expected: a store that keeps all"):
            act()


def test_info_and_verify_tell_of_a_rolling_store(rolling):
    facts = info.info(InfoSettings(target=rolling))
    assert facts["window_sequences"] == WINDOW
    found = verify.verify(VerifySettings(target=rolling))
    assert found["ok"]
    assert found["absent_shards"] == 10 - len(training_shards(rolling))
    assert "training shards are not there now" in verify.summary(found)


def test_a_run_without_states_needs_no_producer(rolling, whole, tmp_path):
    """The teacher computes them: the windows are the same, and the producer hears nothing."""
    live = short_run(rolling, tmp_path / "live", from_teacher=True)
    train(live)
    assert not registered(rolling)
    train(short_run(whole, tmp_path / "whole", window=WINDOW, from_teacher=True))
    assert_same_weights(tmp_path / "live/run", tmp_path / "whole/run")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"workers": 2}, "--rolling with --workers"),
        ({"ray": "local"}, "--rolling with --ray"),
        ({"part": "1/2"}, "--rolling with --part"),
        ({"tokens_only": True}, "--rolling with --tokens-only"),
        ({"store": Path("s3://bucket/states.zarr")}, "--rolling with a store at s3://bucket"),
        ({"rolling": 3 * SHARD - 1}, f"--rolling {3 * SHARD - 1} / expected: at least {3 * SHARD}: "),
    ],
)
def test_what_a_rolling_store_cannot_be(given, what, teachers, text, tmp_path):
    with pytest.raises(SettingsError, match=what):
        extract(extraction(tmp_path, teachers["neox"], text, **given))
    assert not (tmp_path / "neox").exists()


def test_a_dry_run_tells_what_is_on_the_disk_at_a_time(teachers, text, tmp_path):
    planned = extract(extraction(tmp_path, teachers["neox"], text, dry_run=True))
    assert planned["bytes"] == CAP + 2 * 44 * CONTEXT * 4
