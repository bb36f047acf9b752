"""The whole story once, as a user types it: text to Table 1, on both families."""

import json
from pathlib import Path

import pytest
import xarray as xr
import zarr

from lftpipe.cli import app as cli

CONTEXT = 32


@pytest.fixture
def type_(capsys, monkeypatch, tmp_path):
    """Type a command in an empty folder; its JSON, or its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LFTPIPE_WORKSPACE", raising=False)

    def run(*arguments: object, json_: bool = True):
        words = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as exit_:
            cli.app([*words, "--json"] if json_ else words, prog_name="lftpipe")
        out, err = capsys.readouterr()
        assert not exit_.value.code, err
        return json.loads(out) if json_ else out

    return run


@pytest.mark.parametrize("family", ["neox", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_story(type_, teachers, text_folder, family):
    extracted = type_(
        "extract", "--model", teachers[family], "--corpus", text_folder, "--context", CONTEXT,
        "--tokens", 60 * CONTEXT, "--validation-tokens", 8 * CONTEXT, "--layers", "all",
    )  # fmt: skip
    store = Path(extracted["store"])
    assert store == Path("data") / family / "states.zarr"
    assert zarr.open_array(store, path="train/hidden", mode="r").shape == (5, 60, CONTEXT, 32)
    opened = xr.open_zarr(store, group="train")
    assert opened.hidden.dims == ("layer", "sequence", "position", "feature")

    coupled = type_("recouple", "--tokens", 64, "--batches", 2)
    assert (store.parent / "recoupling.png").exists()
    assert coupled["layers"] == [0, 1, 2, 3, 4]

    batches = ("--tokens", 160 * CONTEXT, "--batch-tokens", 8 * CONTEXT)
    flowing = type_("train", "--from-cache", *batches, "--solver", "euler")
    m, n = flowing["block"]
    assert n - m == 1  # a quarter of four layers, the map's choice
    plain = type_("train", "--from-cache", *batches, "--block", f"{m}:{n}", "--objective", "regression")
    assert Path(plain["run"]).parent == Path(flowing["run"]).parent == store.parent / "runs"

    table = type_("evaluate", "--k", "1,2", "--skips", "1")
    assert [row["method"] for row in table["rows"]].count("fw") == 2
    rows = {(row["method"], row["k"]): row for row in table["rows"]}
    skip = next(row for row in table["rows"] if row["method"].startswith("skip"))
    assert rows["regression", 1]["nmse"] < skip["nmse"]
    assert rows["fw", 2]["nfe"] == 2
    assert rows["teacher", None]["ppl"] > 1

    for command in (["info"], ["info", flowing["run"]], ["verify"], ["report"]):
        assert type_(*command, json_=False).strip()
    page = (store.parent / "report.md").read_text()
    assert "recoupling.png" in page
    assert "| fw |" in page
    assert type_("verify")["ok"]


def test_what_is_there_is_not_written_over(type_, teachers, text_folder, capsys):
    common = ("extract", "--model", teachers["neox"], "--corpus", text_folder, "--context", CONTEXT)
    type_(*common, "--tokens", 20 * CONTEXT, "--validation-tokens", 4 * CONTEXT)
    type_("train", "--block", "1:3", "--tokens", 20 * CONTEXT, "--objective", "linear")
    type_("evaluate", "--skips", "1")
    changed = ["train", "--block", "1:3", "--objective", "linear", "--tokens", 64]
    for command in (["evaluate", "--skips", "2"], changed):
        with pytest.raises(SystemExit) as exit_:
            cli.app([str(word) for word in command], prog_name="lftpipe")
        assert exit_.value.code == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "--force" in err
