"""What no random damage makes, to every reader: endless nesting, links in a circle, folders for files."""

import shutil
import sys
from pathlib import Path

import pytest
from test_fuzz import NAMES, Reader, readers  # noqa: F401 (a fixture)

from lftpipe.base.errors import LftpipeError
from lftpipe.cli.guard import line_of

DEEP = 100_000

#: A tokenizer needs none.
OPTIONAL = "tokenizer config"

CONTENTS = {
    "nothing": b"",
    "lists without end": b"[" * DEEP,
    "closed lists": b"[" * DEEP + b"]" * DEEP,
    "objects without end": b'{"a":' * DEEP,
    "deep values": b'{"digest": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep TOML": b"a = " + b"[" * DEEP + b"]" * DEEP,
    "deep tables": b"{a=" * DEEP,
    "a long number": b'{"a": ' + b"1" * DEEP + b"}",
    "no text": b"\xff\xfe\x00" * 99,
}


def answer_of(reader: Reader) -> str:
    """Its line, in which nothing is called a defect; nothing if it reads what is there."""
    limit = sys.getrecursionlimit()
    try:
        reader.read()
    except (LftpipeError, OSError) as error:
        line = line_of(error)
        assert line.startswith("given: ")
        assert "\n" not in line
        assert len(line) < 2000
        return line
    finally:
        assert sys.getrecursionlimit() == limit
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_hostile_content_is_refused_in_one_line(readers, name):  # noqa: F811
    reader: Reader = readers[name]
    whole = reader.file.read_bytes()
    answers = {}
    try:
        for what, content in CONTENTS.items():
            reader.file.write_bytes(content)
            answers[what] = answer_of(reader)
    finally:
        reader.file.write_bytes(whole)
    refused = [what for what, line in answers.items() if line]
    assert answer_of(reader) == ""
    expected = 2 if name in ("a.txt", "a.jsonl", "a.jsonl.gz") else len(CONTENTS) - 2
    assert len(refused) >= (1 if name == "a.txt" else expected), answers


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_in_one_line(readers, name):  # noqa: F811
    reader: Reader = readers[name]
    kept = reader.file.with_name(reader.file.name + ".kept")
    reader.file.rename(kept)
    try:
        reader.file.symlink_to(reader.file.name)
        assert name == OPTIONAL or answer_of(reader)
        reader.file.unlink()
        reader.file.mkdir()
        (reader.file / "inner").touch()
        assert name == OPTIONAL or name.startswith("a.") or answer_of(reader)  # a folder is a corpus too
    finally:
        clear(reader.file)
        kept.rename(reader.file)
    assert answer_of(reader) == ""


def clear(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
