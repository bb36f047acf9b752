"""The commands that a report shows make again what it shows."""

import shlex
from pathlib import Path

import pytest
from conftest import extracted
from training_runs import assert_same_weights, short_run

from lftpipe.cli import app as cli
from lftpipe.commands.evaluate import evaluate
from lftpipe.commands.heal import heal
from lftpipe.commands.train import train
from lftpipe.config.settings import EvaluateSettings, HealSettings
from lftpipe.reporting.pages import collect


def typed(command: str, *more: str) -> None:
    words = shlex.split(command)
    assert words[0] == "lftpipe"
    with pytest.raises(SystemExit) as ended:
        cli.app([*words[1:], *more], prog_name="lftpipe")
    assert ended.value.code in (0, None), command


@pytest.mark.slow
@pytest.mark.parametrize("tokens_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_they_make_the_same_again(
    teachers: dict[str, Path],
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens_only: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LFTPIPE_WORKSPACE", "elsewhere")
    store = extracted(tmp_path / "data", teachers["neox"], text_folder, tokens_only=tokens_only)
    # Paths in the recipe, as they are typed most often, are relative.
    common = {"from_teacher": tokens_only, "objective": "distil", "loss": "regression", "workspace": "data"}
    both = {"joint": True, "block": "0:1,1:4", "depth": (1, 2), "run": "both"}
    train(short_run(store, tmp_path, **common | both))
    train(short_run(store, tmp_path, **common | {"run": "one"}))
    if not tokens_only:
        heal(HealSettings(store=store, target="one", adapter="full", loss="logits", tokens=256))
    evaluate(EvaluateSettings(store=store, workspace=Path("data"), k=(1,), skips=(1,)))
    for command in collect(store.parent).commands:
        typed(command, *(["--force"] if command.startswith("lftpipe evaluate") else []))
    assert (store.parent / "report.html").is_file()
    made = {path.parent.name: path.parent for path in store.parent.glob("runs/*/manifest.json")}
    again = {"one-again": "one", "both-again": "both"}
    if not tokens_only:
        again["one-healed-again"] = "one-healed"
    assert made.keys() == again.keys() | set(again.values())
    for new, old in again.items():
        assert_same_weights(made[new], made[old])
