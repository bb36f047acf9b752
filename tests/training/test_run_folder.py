"""A run's folder: nothing else is taken for one, it has one writer, and a damaged checkpoint is noticed."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import extracted
from training_runs import change, short_run, stop_before, weights_of

from lftpipe import runs
from lftpipe.base.errors import LftpipeError, RunError, SettingsError
from lftpipe.base.outputs import one_writer
from lftpipe.commands.train import train
from lftpipe.config.settings import TrainSettings
from lftpipe.results.run import RunManifest, read_metrics
from lftpipe.store import Store, verify_store
from lftpipe.training.checkpoint import BEFORE, read_checkpoint


@pytest.fixture
def settings(stores, tmp_path) -> TrainSettings:
    return short_run(stores["neox"], tmp_path)


@pytest.fixture
def unfinished(settings, monkeypatch) -> Path:
    """A run that was stopped after its second checkpoint, of step 10."""
    with monkeypatch.context() as patch:
        stop_before(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    return Path(str(settings.run))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["a store", "notes", "a checkpoint", "a file"])
def test_what_is_no_run_is_never_written_into(
    settings, teachers, text_folder, tmp_path, unfinished, force, what
):
    place = tmp_path / "place"
    if what == "a store":
        place = extracted(tmp_path, teachers["neox"], text_folder)
    elif what == "notes":
        place.mkdir()
        (place / "manifest.json").write_text("{}")
        (place / "flow.safetensors").write_text("mine")
    elif what == "a checkpoint":  # without its settings nobody knows of which run it is
        unfinished.rename(place)
        (place / runs.SETTINGS).unlink()
    else:
        place.write_text("mine")
    before = content(tmp_path) if what != "a file" else place.read_bytes()
    with pytest.raises(RunError, match=r"(place|states\.zarr), which holds .* and no run"):
        train(change(settings, run=str(place), force=force, resume=not force, seed=1))
    assert (content(tmp_path) if what != "a file" else place.read_bytes()) == before
    if what == "a store":
        assert verify_store(place).ok


@pytest.mark.parametrize("name", ["..", ".", ".hidden"])
def test_a_runs_name_leads_nowhere_else(settings, name):
    with pytest.raises(SettingsError, match="a plain name"):
        train(change(settings, run=name))


def test_a_finished_run_without_its_settings_is_kept(settings):
    train(settings)
    run = Path(str(settings.run))
    (run / runs.SETTINGS).unlink()
    before = content(run)
    for resume in (False, True):
        with pytest.raises(RunError, match=r"finished run .*run that lost its settings\.toml"):
            train(change(settings, seed=1, resume=resume))
    assert content(run) == before
    train(change(settings, seed=1, force=True))
    assert runs.open_run(run).seed == 1


def test_a_run_has_one_writer(settings, unfinished):
    with one_writer(unfinished), pytest.raises(RunError, match="run, which another process is making"):
        train(change(settings, resume=True))
    train(change(settings, resume=True))
    assert not (unfinished / ".lock").exists()


def test_nothing_of_a_checkpoint_stays_beside_a_finished_run(settings, unfinished):
    kept = content(unfinished)
    train(change(settings, resume=True))
    assert not (unfinished / "checkpoint").exists()
    for name, data in kept.items():  # as if it had been killed just before it removed them
        if name.startswith("checkpoint"):
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_bytes(data)
    assert train(settings)["already_finished"]
    assert not (unfinished / "checkpoint").exists()


def test_no_flipped_or_missing_byte_of_a_checkpoint_is_gone_on_from(settings, unfinished, capsys):
    newest = unfinished / runs.CHECKPOINT
    whole, rng = newest.read_bytes(), random.Random(0)
    binding = whole[8:24].hex()
    places = [*range(48), *(rng.randrange(len(whole)) for _ in range(150))]
    damaged = [
        whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
        for place in places
    ]
    for data in [*damaged, b"", whole[:39], whole[:-1], whole + b"x"]:
        newest.write_bytes(data)
        with pytest.raises(ValueError, match=r"digest|no checkpoint|other settings"):
            read_checkpoint(newest, binding)
    train(change(settings, run=str(unfinished.with_name("whole"))))
    result = train(change(settings, resume=True))
    assert result["steps"] == 12
    said = capsys.readouterr().err
    assert "state.pt: its digest does not match its content; trying the one before" in said
    assert "before.pt, step 5" in said
    ours, theirs = weights_of(unfinished), weights_of(unfinished.with_name("whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_of_another_run_is_refused(settings, unfinished, tmp_path):
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(change(settings, seed=1, run=str(other)))
    (unfinished / runs.CHECKPOINT).write_bytes((other / runs.CHECKPOINT).read_bytes())
    (unfinished / "checkpoint" / BEFORE).unlink()
    with pytest.raises(RunError, match=r"damaged .*state\.pt"):
        train(change(settings, resume=True))


def test_the_manifest_knows_its_metrics(settings):
    train(settings)
    run = Path(str(settings.run))
    digest = RunManifest.from_json(run / runs.MANIFEST).metrics_digest
    assert digest
    assert read_metrics(run / runs.METRICS, digest).damage is None
    lines = (run / runs.METRICS).read_text().splitlines()
    (run / runs.METRICS).write_text("\n".join(lines[:-1]) + "\n")
    assert "not as the run wrote it" in str(read_metrics(run / runs.METRICS, digest).damage)


def test_a_store_that_is_made_again_meanwhile_is_not_claimed(
    settings, teachers, text_folder, tmp_path, monkeypatch
):
    store = extracted(tmp_path, teachers["neox"], text_folder)
    real = Store.batches

    def batches(self, *arguments, **options):
        yield from (batch for _, batch in zip(range(6), real(self, *arguments, **options), strict=False))
        extracted(tmp_path, teachers["neox"], text_folder, dtype="float32", force=True)
        yield from real(Store.open(store), *arguments, **options | {"start_step": 6})

    monkeypatch.setattr(Store, "batches", batches)
    with pytest.raises(LftpipeError, match=r"states\.zarr, which was made again while a run"):
        train(change(settings, store=store, tokens=8 * 4 * 32))
    assert not (Path(str(settings.run)) / runs.MANIFEST).exists()


def test_an_edited_manifest_is_no_run(settings):
    train(settings)
    file = Path(str(settings.run)) / runs.MANIFEST
    value = json.loads(file.read_text())
    for key, edited in (("block", [0, 2]), ("solver", "midpoint"), ("seed", 7), ("digest", "0")):
        file.write_text(json.dumps(value | {key: edited}))
        with pytest.raises(RunError, match="its digest does not match its content"):
            runs.open_run(file.parent)
    file.write_text(json.dumps({key: entry for key, entry in value.items() if key != "digest"}))
    with pytest.raises(RunError, match="its digest does not match its content"):
        runs.open_run(file.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hold_back": 1.0}, "--hold-back 1"),
        ({"objective": "linearpatch"}, "a known Hadamard matrix"),
        ({"loss": "regression@0.5/sampled-logits", "objective": "regression"}, "more than a linear map"),
        ({"init": "readout"}, "whose two branches each end"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("lftpipe.training.closed_form.hadamard", _no_matrix)
    monkeypatch.setattr("lftpipe.training.starts.is_linear_map", lambda _: False)
    train(settings)
    before = content(Path(str(settings.run)))
    settings = change(settings, **changes)
    if "loss" in changes:
        monkeypatch.setattr("lftpipe.teacher.tail.Tail.linear_head", None)
        monkeypatch.setattr(
            "lftpipe.training.validate._check_terms", lambda *_: None
        )  # of a store with logits
    with pytest.raises(LftpipeError, match=message):
        train(change(settings, force=True))
    assert content(Path(str(settings.run))) == before
    with pytest.raises(LftpipeError, match=message):
        train(change(settings, run=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def _no_matrix(width: int) -> torch.Tensor:
    raise ValueError(width)
