"""`lftpipe push`, `pull` and `export --push-to-hub`, on a Hub of this machine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, install
from huggingface_hub import DatasetCard, ModelCard
from tiny_students import save_run

from lftpipe import runs
from lftpipe.base.errors import LftpipeError
from lftpipe.commands import pull as pull_stage
from lftpipe.commands import push as push_stage
from lftpipe.commands.export import export
from lftpipe.commands.pull import pull
from lftpipe.commands.push import push
from lftpipe.config.settings import ExportSettings, PullSettings, PushSettings
from lftpipe.results.outcomes import Pulled, Pushed
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return install(monkeypatch, tmp_path / "hub")


@pytest.fixture
def flow(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    path = save_run(tmp_path / "here" / "neox" / "runs" / "flow", neox_teacher, (1, 3), solver="euler").path
    runs.write_settings(path, {"block": "1:3"}, "0" * 32)
    (path / "checkpoint").mkdir()
    (path / "checkpoint/state.pt").write_bytes(b"left behind")
    return runs.open_run(path)


def pushed(tmp_path: Path, target: object, name: str = "org/thing", **options: Any) -> Pushed:
    return push(PushSettings(workspace=tmp_path / "here", target=str(target), repository=name, **options))


def pulled(tmp_path: Path, source: str, **options: Any) -> Pulled:
    return pull(PullSettings(workspace=tmp_path / "there", source=source, **options))


def test_a_run_comes_back_as_it_was(hub: FakeHub, flow: runs.Run, tmp_path: Path) -> None:
    there = pushed(tmp_path, "flow", license="apache-2.0", private=True)
    assert there["url"] == "hf://org/thing"
    assert hub.calls == [("create_repo", True)]
    assert there["web"] in push_stage.summary(there)
    back = pulled(tmp_path, "hf://org/thing")
    assert back["path"] == str(tmp_path / "there/neox/runs/thing")
    assert not back["already_there"]
    assert runs.open_run(Path(back["path"])).weights_digest == flow.weights_digest
    assert sorted(path.name for path in Path(back["path"]).iterdir()) == [
        "flow.safetensors",
        "manifest.json",
        "settings.toml",
    ]
    assert "next: lftpipe generate" in pull_stage.summary(back)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["neox"]  # nothing hidden is left
    assert pulled(tmp_path, "hf://org/thing")["already_there"]


def test_the_card_of_a_run_has_the_hubs_metadata(hub: FakeHub, flow: runs.Run, tmp_path: Path) -> None:
    pushed(tmp_path, "flow", license="apache-2.0")
    card = ModelCard((hub.folder("org/thing", "model") / "README.md").read_text())
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["base_model"]) == (
        "apache-2.0",
        "lftpipe",
        "neox",
    )
    assert "latent-flow-transformer" in data["tags"]
    assert "lftpipe pull hf://org/thing --run flow" in card.text
    assert "| flow | 1:3 | fw |" in card.text


def test_a_store_comes_back_byte_for_byte(hub: FakeHub, stores: dict[str, Path], tmp_path: Path) -> None:
    there = pushed(tmp_path, stores["neox"], "org/states")
    assert there["url"] == "hf://datasets/org/states"
    arrays = [path for path in stores["neox"].glob("*/**/*") if path.is_file()]
    assert there["bytes"] > sum(path.stat().st_size for path in arrays) > 0
    card = DatasetCard((hub.folder("org/states", "dataset") / "README.md").read_text())
    data = card.data.to_dict()
    assert "zarr" in data["tags"]
    assert "1,536 train and 224 validation" in card.text
    assert "lftpipe pull hf://datasets/org/states" in card.text
    back = pulled(tmp_path, "hf://datasets/org/states")
    assert back["path"] == str(tmp_path / "there/neox/states.zarr")
    for path in Path(back["path"]).rglob("*"):
        assert (
            path.is_dir()
            or path.read_bytes() == (stores["neox"] / path.relative_to(back["path"])).read_bytes()
        )
    assert Store.open(Path(back["path"])).fingerprint == Store.open(stores["neox"]).fingerprint


def test_a_damaged_repository_is_refused_and_leaves_nothing(
    hub: FakeHub, flow: runs.Run, stores: dict[str, Path], tmp_path: Path
) -> None:
    pushed(tmp_path, stores["neox"], "org/states")
    shard = max(
        (hub.folder("org/states", "dataset")).rglob("train/*/c*"), key=lambda path: path.stat().st_size
    )
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    pushed(tmp_path, "flow")
    (hub.folder("org/thing", "model") / "flow.safetensors").write_bytes(b"other weights")
    for url, message in (
        ("hf://datasets/org/states", "bytes differ from those written"),
        ("hf://org/thing", "flow.safetensors"),
    ):
        with pytest.raises(LftpipeError, match=message):
            pulled(tmp_path, url)
    assert list((tmp_path / "there").iterdir()) == []


def test_nothing_of_another_run_is_replaced(
    hub: FakeHub, flow: runs.Run, neox_teacher: Teacher, tmp_path: Path
) -> None:
    pushed(tmp_path, "flow")
    save_run(tmp_path / "there/neox/runs/thing", neox_teacher, (0, 2))
    with pytest.raises(LftpipeError, match=r"which is another one .* pass --run NAME"):
        pulled(tmp_path, "hf://org/thing")
    assert pulled(tmp_path, "hf://org/thing", run="second")["path"].endswith("runs/second")


def test_an_export_is_pushed_with_its_card(hub: FakeHub, flow: runs.Run, tmp_path: Path) -> None:
    made = export(
        ExportSettings(
            workspace=tmp_path / "here", runs=("flow",), out=tmp_path / "out", push_to_hub="org/student",
            license="mit",
        )
    )  # fmt: skip
    there = hub.folder("org/student", "model")
    assert made["pushed"] == "https://huggingface.co/org/student"
    assert {path.name for path in there.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    card = ModelCard((there / "README.md").read_text())
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("mit", "transformers")
    # The folder can be pushed later too, and is no run to pull.
    shutil.rmtree(there)
    assert pushed(tmp_path, tmp_path / "out", "org/student")["kind"] == "student"
    assert (there / "README.md").read_text() == (tmp_path / "out/README.md").read_text()
    with pytest.raises(LftpipeError, match="a model of transformers"):
        pulled(tmp_path, "hf://org/student")


def test_without_a_token_nothing_is_computed(flow: runs.Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    settings = ExportSettings(
        workspace=tmp_path / "here", runs=("flow",), out=tmp_path / "out", push_to_hub="a/b"
    )
    for call in (lambda: export(settings), lambda: pushed(tmp_path, "flow")):
        with pytest.raises(LftpipeError, match=r"no token .* set HF_TOKEN"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://org/nowhere", r"hf://org/nowhere, which the Hugging Face Hub does not show"),
        ("hf://datasets/org/nowhere", "does not show"),
        ("hf://nowhere", "hf://ORG/NAME for a run"),
        ("s3://bucket/run", "hf://ORG/NAME for a run"),
    ],
)
def test_an_unknown_repository_is_one_line(hub: FakeHub, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(LftpipeError, match=message):
        pulled(tmp_path, source)


def test_a_token_without_the_right_is_one_line(hub: FakeHub, flow: runs.Run, tmp_path: Path) -> None:
    hub.status = 403
    with pytest.raises(LftpipeError, match=r"refused by the Hugging Face Hub \(403\)"):
        pushed(tmp_path, "flow")
    hub.status = 503
    with pytest.raises(LftpipeError, match="a Hugging Face Hub that answers"):
        pushed(tmp_path, "flow")


def test_what_is_no_repository_is_refused(hub: FakeHub, flow: runs.Run, tmp_path: Path) -> None:
    (hub.folder("org/empty", "dataset")).mkdir(parents=True)
    with pytest.raises(LftpipeError, match=r"holds no states\.zarr and no run"):
        pulled(tmp_path, "hf://datasets/org/empty")
    with pytest.raises(LftpipeError, match="ORG/NAME"):
        pushed(tmp_path, "flow", "name-alone")
    with pytest.raises(LftpipeError, match="what and where to"):
        push(PushSettings(workspace=tmp_path))
