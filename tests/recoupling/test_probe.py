"""The linear probe: what a least-squares map from a block's start to its end leaves."""

import dataclasses
import shutil

import pytest
from conftest import CONTEXT

from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.commands.recouple import recouple
from lftpipe.config.settings import RecoupleSettings, TrainSettings
from lftpipe.recoupling.probe import draw_parts, probe_residual
from lftpipe.recoupling.stored_map import choose_block
from lftpipe.store import Store


def test_the_probe_measures_on_sequences_that_it_was_not_fitted_on(stores):
    opened = Store.open(stores["neox"])
    fit_on, measure_on = draw_parts(opened, 20 * CONTEXT, seed=1)
    assert (len(fit_on), len(measure_on)) == (20, 5)
    assert not set(fit_on) & set(measure_on)
    assert draw_parts(opened, 20 * CONTEXT, seed=1) == (fit_on, measure_on)
    everything = draw_parts(opened, 10**9, seed=0)
    assert (len(everything[0]), len(everything[1])) == (38, 9)


def test_the_probe_finds_a_linear_block_linear(stores):
    """A state against itself is linear; a block of this teacher is not."""
    opened = Store.open(stores["neox"])
    parts = draw_parts(opened, 16_384, seed=0)
    assert probe_residual(opened, (2, 2), *parts) < 1e-9
    assert probe_residual(opened, (0, 4), *parts) > probe_residual(opened, (3, 4), *parts) > 1e-6


def test_one_sequence_is_too_little_for_a_probe(stores, monkeypatch):
    opened = Store.open(stores["neox"])
    monkeypatch.setattr(Store, "num_sequences", lambda self, split: 1)
    with pytest.raises(StoreError, match="1 training sequences / expected: two at least"):
        draw_parts(opened, 100, seed=0)


def test_blocks_can_be_chosen_by_the_probe(tmp_path, stores):
    here = tmp_path / "neox" / "states.zarr"
    shutil.copytree(stores["neox"], here)
    settings = RecoupleSettings(store=here, tokens=64, batches=2)
    recouple(settings)
    by_probe = TrainSettings(store=here, replace=0.25, rank_by="probe")
    with pytest.raises(SettingsError, match=r"without probe_residual .* recouple --rank-by probe --force"):
        choose_block(here, by_probe)
    found = recouple(dataclasses.replace(settings, rank_by="probe", force=True))
    residuals = {(m, m + 1): found["probe_residual"][m][m + 1] for m in range(4)}
    assert choose_block(here, by_probe) == min(residuals, key=residuals.__getitem__)
    assert found["ranking"][0]["blocks"] == [
        list(block) for block in sorted(residuals, key=residuals.__getitem__)
    ]
