"""Recognisers' encoders, which run once: text in images by ONNX, speech by Whisper, anyone's posteriors."""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from lftpipe.base.errors import SettingsError, foreign
from lftpipe.base.files import file_digest
from lftpipe.fusion.recogniser import check_posteriors

#: What Whisper hears at once.
_MOST_SECONDS = 30
_RATE = 16_000


class Encoder(NamedTuple):
    """A recogniser's first half: `encode` makes frames by labels, or by features, of a file."""

    facts: dict[str, Any]
    labels: list[str]
    encode: Callable[[Path], Float[np.ndarray, "frame feature"]]


def open_encoder(name: str, workspace: Path, device: str = "cpu") -> Encoder:
    """A recogniser by name: `pp-ocrv4`, an `.onnx` file, a folder or Hub id of Whisper's kind, or `npz`.

    Raises `SettingsError` if there is none of the name, or it is of another kind.
    """
    if name == "npz":
        return Encoder({"name": "npz", "kind": "ctc"}, [], _read_posteriors)
    if name == "pp-ocrv4":
        weights = workspace / name / "recogniser.onnx"
        if not weights.is_file():
            raise SettingsError(f"{name} without {weights}", "its weights", "fetch them with `make pp-ocrv4`")
        return _ocr(name, weights)
    path = Path(name)
    if path.suffix == ".onnx":
        return _ocr(name, path)
    return _whisper(name, device)


def _ocr(name: str, path: Path) -> Encoder:
    """A CTC recogniser of lines of text whose labels are in its metadata, as PaddleOCR exports them."""
    expected, do = "an ONNX file with `character` in its metadata", 'pip install ".[ocr]", and name one'
    with foreign(SettingsError, f"the recogniser {path}", expected, do):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    labels = ["", *characters, " "]

    def encode(image: Path) -> Float[np.ndarray, "frame label"]:
        pixels = _line_of(image)
        posteriors: Any = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0]
        posteriors = posteriors[0]
        if posteriors.shape[1] != len(labels):
            raise SettingsError(
                f"{posteriors.shape[1]} posteriors for {len(labels)} labels", "one each", "use another model"
            )
        return np.log(np.maximum(posteriors, 1e-9))

    return Encoder({"name": name, "kind": "ctc", "digest": file_digest(path)}, labels, encode)


def _line_of(image: Path) -> Float[np.ndarray, "channel 48 width"]:
    """One line of text, 48 pixels high, from -1 to 1, blue first."""
    with foreign(SettingsError, f"the image {image}", "a picture of one line of text", "convert it to PNG"):
        from PIL import Image

        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    width, height = picture.size
    if not width or not height or height > 4 * width:
        raise SettingsError(f"{image} of {width} by {height} pixels", "one line of text", "cut it into lines")
    scaled = picture.resize((max(48, round(width * 48 / height)), 48), Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled, dtype=np.float32)[:, :, ::-1].transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1)


def _read_posteriors(path: Path) -> Float[np.ndarray, "frame label"]:
    return read_npz(path)[0]


def read_npz(path: Path) -> tuple[Float[np.ndarray, "frame label"], list[str]]:
    """`log_posteriors` and `labels` of anyone's recogniser, the blank named ``""``; nothing is unpickled."""
    do = "write `log_posteriors` and `labels` with numpy.savez"
    given = f"the file {path}"
    with foreign(SettingsError, given, "posteriors in .npz", do), np.load(path, allow_pickle=False) as file:
        log_posteriors, labels = file["log_posteriors"], [str(each) for each in file["labels"]]
    check_posteriors(log_posteriors, labels)
    return log_posteriors, labels


def read_wav(path: Path) -> Float[np.ndarray, " sample"]:
    """A recording of 16-bit mono samples at 16 kHz, from -1 to 1."""
    expected = f"16-bit PCM, mono, {_RATE} Hz, up to {_MOST_SECONDS} s"
    do = f"convert it: ffmpeg -i IN -ac 1 -ar {_RATE} -sample_fmt s16 OUT.wav; cut long ones at a pause"
    with foreign(SettingsError, f"the recording {path}", expected, do), wave.open(str(path)) as file:
        given = (file.getsampwidth(), file.getnchannels(), file.getframerate())
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") if given[0] == 2 else None
    if given != (2, 1, _RATE) or samples is None or not 0 < len(samples) <= _MOST_SECONDS * _RATE:
        seconds = 0.0 if samples is None else len(samples) / given[1] / given[2]
        raise SettingsError(
            f"{path}: {8 * given[0]} bits, {given[1]} channels, {given[2]} Hz, {seconds:.1f} s", expected, do
        )
    if not samples.any():
        raise SettingsError(f"{path}: silence", "speech", "leave it out")
    return samples.astype(np.float32) / 32768


def _whisper(name: str, device: str) -> Encoder:
    model, _ = open_whisper(name, device)
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)

    def encode(recording: Path) -> Float[np.ndarray, "frame feature"]:
        features = extractor(read_wav(recording), sampling_rate=_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            states = model.get_encoder()(features.to(device, model.dtype)).last_hidden_state
        return states[0].float().cpu().numpy()

    return Encoder({"name": name, "kind": "seq2seq"}, [], encode)


def open_whisper(name: str, device: str) -> tuple[Any, Any]:
    """A model of Whisper's kind and its tokenizer, from a folder or the Hub; safetensors alone."""
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    expected, do = "a folder or Hub id of Whisper's kind, `pp-ocrv4`, an .onnx file, or `npz`", "name one"
    with foreign(SettingsError, f"the recogniser {name}", expected, do):
        model: Any = WhisperForConditionalGeneration.from_pretrained(name, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.eval().to(device), tokenizer
