import json
from pathlib import Path

import pytest
import torch

from lftpipe.base.errors import SettingsError
from lftpipe.commands.toy import keeps_pair, pairs, summary, toy
from lftpipe.config.settings import ToySettings


def test_partners_are_crosswise_and_a_straight_move_keeps_no_pair():
    x_0, x_1 = pairs(500, 0)
    assert ((x_1 - x_0)[:, 0, 0] == 2).all()
    assert keeps_pair(x_1, x_1).float().mean() > 0.99
    assert not keeps_pair(x_0 + torch.tensor([2.0, 0.0]), x_1).float().mean() > 0.01
    middle = (x_0 + x_1)[:, 0] / 2
    assert middle.mean(0).abs().max() < 0.1  # all lines meet there


@pytest.mark.slow
def test_matching_recouples_and_walking_keeps_the_pairs(tmp_path):
    settings = ToySettings(workspace=tmp_path, steps=100, batch=128, steps_at_inference=16)
    result = toy(settings)
    kept = {panel["panel"]: panel["pairs_kept"] for panel in result["panels"]}
    assert kept["SFM"] < 0.1
    assert kept["FW, k = 1"] > 0.9
    assert kept["FW, k = 3"] > 0.9
    written = json.loads((tmp_path / "toy.json").read_text())
    assert written["panels"] == result["panels"]
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    assert "FW, k = 3" in summary(result)
    with pytest.raises(SettingsError, match=r"toy\.json, which exists / expected: a new file"):
        toy(settings)
    assert Path(result["out"]) == tmp_path / "toy.json"
