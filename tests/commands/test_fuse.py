"""`lftpipe recognise` and `fuse`: what was heard is kept, corrected and measured."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from lftpipe.base.errors import LftpipeError, SettingsError, StoreError
from lftpipe.commands.fuse import fuse, summary
from lftpipe.commands.generate import generate
from lftpipe.commands.recognise import recognise
from lftpipe.config.settings import FuseSettings, GenerateSettings, RecogniseSettings
from lftpipe.fusion.encoders import read_wav
from lftpipe.fusion.errors import character_errors, edits, word_errors
from lftpipe.store.heard import HeardStore

TRUTHS = ["the state of a layer", "def self return", "layer walk into next", "not a state of self"]
LABELS = ["", *sorted(set("".join(TRUTHS)))]


def spoken(text: str, seed: int) -> np.ndarray:
    """Posteriors of a text, each character for two frames and a blank, with noise."""
    path = [at for char in text for at in (LABELS.index(char), LABELS.index(char), 0)]
    logits = np.random.default_rng(seed).normal(size=(len(path), len(LABELS)))
    logits[np.arange(len(path)), path] += 4.5
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for number, text in enumerate(TRUTHS):
        np.savez(tmp_path / f"{number}.npz", log_posteriors=spoken(text, number), labels=LABELS)
    (tmp_path / "truths.txt").write_text("".join(f"{text}\n" for text in TRUTHS))
    return [str(tmp_path / f"{number}.npz") for number in range(len(TRUTHS))]


def heard(tmp_path: Path, files: list[str], **changes) -> dict:
    return dict(
        recognise(RecogniseSettings(workspace=tmp_path, recogniser="npz", files=tuple(files), **changes))
    )


def test_what_was_heard_is_kept_and_not_heard_again(tmp_path, files):
    first = heard(tmp_path, files[:2])
    assert (first["inputs"], first["added"], first["kind"]) == (2, 2, "ctc")
    again = heard(tmp_path, files)
    assert (again["inputs"], again["added"]) == (4, 2)
    store = HeardStore.open(tmp_path / "heard.zarr")
    for (name, values), text in zip(store, TRUTHS, strict=True):
        assert np.allclose(values, spoken(text, int(Path(name).stem)), atol=2e-2)


def test_a_changed_byte_of_what_was_heard_is_noticed(tmp_path, files):
    heard(tmp_path, files[:1])
    store = HeardStore.open(tmp_path / "heard.zarr")
    (chunk,) = [
        each
        for each in (store.path / "input-00000").rglob("*")
        if each.is_file() and "zarr.json" not in each.name
    ]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(StoreError, match="every byte as written"):
        list(store)
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("input-00000", "input-00001"))
    with pytest.raises(StoreError, match="lftpipe recognise"):
        HeardStore.open(store.path)


def test_texts_are_fused_measured_and_compared(tmp_path, files, teachers):
    heard(tmp_path, files)
    found = fuse(
        FuseSettings(
            workspace=tmp_path, target=str(teachers["neox"]), weight=0.1, references=tmp_path / "truths.txt",
            compare=True, beams=3, candidates=4, context="previous",
        )
    )  # fmt: skip
    methods = [row.method for row in found.fusion.rows]
    assert methods == ["recogniser alone", "rescored", "fused, delayed (GFD)", "fused"]
    assert found.fusion.rows[0].cer < 0.1  # the language model knows nothing: it can only confuse
    pairs = zip(TRUTHS, (each.text for each in found.fusion.texts), strict=True)
    errors = [character_errors(*pair) for pair in pairs]
    assert found.fusion.rows[-1].cer == sum(wrong for wrong, _ in errors) / sum(all_ for _, all_ in errors)
    assert json.loads((tmp_path / "fused.json").read_text())["rows"][0]["method"] == "recogniser alone"
    shown = summary(found)
    assert not isinstance(shown, str)
    assert shown.row_count == 4
    with pytest.raises(LftpipeError, match="--force"):
        fuse(FuseSettings(workspace=tmp_path, target=str(teachers["neox"])))


def test_weights_are_tuned_on_one_half_and_measured_on_the_other(tmp_path, files, teachers):
    heard(tmp_path, files)
    found = fuse(
        FuseSettings(
            workspace=tmp_path, target=str(teachers["neox"]), weights=(0.0, 0.9), beams=2, candidates=2,
            references=tmp_path / "truths.txt",
        )
    ).fusion  # fmt: skip
    assert found.tuning.keys() == {"0", "0.9"}
    assert found.weight == min((0.0, 0.9), key=lambda weight: found.tuning[f"{weight:g}"])
    assert [row.inputs for row in found.rows] == [2]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compare": True}, "without --references"),
        ({"weights": (0.1,)}, "without --references"),
        ({"candidates": 2}, "at least as many"),
        ({"heard": Path("nowhere")}, "lftpipe recognise"),
        ({"target": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_one_line(tmp_path, files, teachers, changes, match):
    heard(tmp_path, files[:1])
    with pytest.raises(LftpipeError, match=match):
        fuse(FuseSettings(**{"workspace": tmp_path, "target": str(teachers["neox"]), **changes}))


def test_references_of_another_count_are_refused(tmp_path, files, teachers):
    heard(tmp_path, files[:1])
    with pytest.raises(SettingsError, match="4 lines"):
        fuse(
            FuseSettings(workspace=tmp_path, target=str(teachers["neox"]), references=tmp_path / "truths.txt")
        )


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_recordings_are_read_or_refused(tmp_path):
    wave_of = (np.sin(np.arange(16_000) / 20) * 9000).astype("<i2")
    assert read_wav(write_wav(tmp_path / "a.wav", wave_of)).shape == (16_000,)
    for name, samples, options, match in (
        ("rate.wav", wave_of, {"rate": 8000}, "8000 Hz"),
        ("stereo.wav", wave_of, {"channels": 2}, "2 channels"),
        ("silent.wav", wave_of * 0, {}, "silence"),
        ("long.wav", np.tile(wave_of, 31), {}, "31"),
        ("empty.wav", wave_of[:0], {}, "0 s"),
    ):
        with pytest.raises(SettingsError, match=match):
            read_wav(write_wav(tmp_path / name, samples, **options))
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    with pytest.raises(SettingsError, match="torn"):
        read_wav(tmp_path / "torn.wav")


def test_edits_are_levenshteins():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert edits(a, b) == slow(a, b)
    assert character_errors("abc", "") == (3, 3)
    assert word_errors("a b  c", "a c") == (1, 3)


def test_two_models_of_different_tokenizers_write_together(tmp_path, teachers):
    def written(**changes):
        settings = GenerateSettings(
            workspace=tmp_path, target=str(teachers["neox"]), prompt="the state", max_new_tokens=6, **changes
        )
        return generate(settings).written.text

    alone = written()
    assert written(fused_with=str(teachers["llama"]), weight=0.0) == alone
    assert written(fused_with=str(teachers["llama"]), weight=0.9) != alone
    with pytest.raises(SettingsError, match="--with beside --compare"):
        written(fused_with=str(teachers["llama"]), compare=True)
