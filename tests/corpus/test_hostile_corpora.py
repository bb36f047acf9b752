"""Corpora that would take the memory, the disk or the recursion limit, or that no text encoding takes."""

import gzip
import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import text_of

from lftpipe.base.errors import CorpusError
from lftpipe.base.files import canonical
from lftpipe.corpus import files, packing
from lftpipe.corpus.packing import Packing
from lftpipe.corpus.readers import Corpus, open_corpus
from lftpipe.corpus.rows import Document
from lftpipe.teacher.source import text_encoder


def documents(path: Path, **options) -> list[Document]:
    return list(open_corpus(str(path), **options).documents())


def pack(texts: list[str], encode, opening=()) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of all texts in sequences of 8."""
    corpus = Corpus("test", lambda: (Document(str(i), text) for i, text in enumerate(texts)), local=True)
    made = list(Packing(corpus, encode, 0, 8, {"train": 10**6, "validation": 10**6}, opening=opening))
    rows = sorted((int(each.document[0]), i, each) for i, each in enumerate(made))
    return (
        [token for _, _, each in rows for token in each.tokens.tolist()],
        [document for _, _, each in rows for document in each.document.tolist()],
    )


@pytest.mark.parametrize("opening", [[], [5], [5, 7]], ids=len)
def test_a_long_text_is_tokenised_in_parts_to_the_same_tokens(tokenizer, monkeypatch, opening):
    texts = ["".join(text_of(seed, 60) for seed in range(40)), "short\n", text_of(1, 400)]
    asked: list[int] = []
    encoder = text_encoder(tokenizer)

    def encode(given: list[str]) -> list[list[int]]:
        asked.append(sum(map(len, given)))
        return encoder(given)

    whole = pack(texts, encode, opening)
    assert max(asked) > 8000
    asked.clear()
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 700)
    assert pack(texts, encode, opening) == whole
    assert max(asked) <= 700


def test_a_text_without_line_ends_or_spaces_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 100)
    asked: list[int] = []

    def encode(given: list[str]) -> list[list[int]]:
        asked.extend(map(len, given))
        return [[ord(character) for character in text] for text in given]

    tokens, _ = pack(["x" * 1000 + "y" * 24], encode)
    assert tokens == [ord("x")] * 1000 + [ord("y")] * 24
    assert max(asked) <= 100


def test_once_a_split_is_full_the_rest_of_a_long_text_is_not_tokenised(monkeypatch):
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 100)
    asked: list[int] = []

    def encode(given: list[str]) -> list[list[int]]:
        asked.extend(map(len, given))
        return [[1] * len(text) for text in given]

    corpus = Corpus("test", lambda: iter([Document("a", "x" * 10_000)]), local=True)
    made = Packing(corpus, encode, 0, 8, {"train": 4, "validation": 4})
    assert len(list(made)) == 4
    assert sum(asked) <= 200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps({"text": "x" * 1001}).encode()),
        ("b.jsonl", b'{"text": "' + b"x" * 100_000),
        ("a.md", b"x" * 1001),
        ("a.py", b"x = 1\n" * 200),
    ],
)
def test_a_document_that_is_too_large_is_refused_by_size(tmp_path, name, content, monkeypatch):
    monkeypatch.setattr(files, "TXT_DOCUMENT_CHARACTERS", 100)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=r"document of more than 1,000 bytes .*--max-document-bytes"):
        documents(tmp_path / name, max_document_bytes=1000)
    if name != "b.jsonl":
        assert documents(tmp_path / name, max_document_bytes=2000)
        assert documents(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".md", ".txt", ".parquet"])
def test_an_archive_that_unpacks_to_absurdly_much_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "UNPACKED_BYTES", 2**20)
    path = tmp_path / f"bomb{suffix}.gz"
    path.write_bytes(gzip.compress(b"x" * 2**24))
    with pytest.raises(CorpusError, match=r"bomb.*gz that unpacks to more than 200 times its size"):
        documents(path, max_document_bytes=2**25)


def test_a_parquet_file_that_unpacks_to_absurdly_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED_BYTES", 2**20)
    pq.write_table(pa.table({"text": ["x" * 2**24]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(CorpusError, match=r"a\.parquet that unpacks to more than 200 times its size"):
        documents(tmp_path / "a.parquet")


def test_a_parquet_file_with_bytes_that_are_no_text_is_refused(tmp_path):
    data = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, data.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1 / expected: UTF-8 text"):
        documents(tmp_path / "a.parquet")


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CorpusError, match=r"line 1 / expected: one JSON object a line"):
        documents(tmp_path / "a.jsonl")


def test_links_in_a_circle_are_refused_or_passed_over(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CorpusError, match=r"corpus '.*loop' / expected: "):
        documents(tmp_path / "loop")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "x.txt").symlink_to("x.txt")
    assert [document.name for document in documents(tmp_path)] == ["a.txt:0"]


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "a\0b"])
def test_a_path_that_leads_nowhere_is_refused(name):
    with pytest.raises(CorpusError, match="corpus "):
        open_corpus(name)


def test_a_folder_deeper_than_the_recursion_limit_is_read(tmp_path):
    path, depth = tmp_path, sys.getrecursionlimit() + 100
    for _ in range(depth):
        path = path / "d"
        path.mkdir()
    (path / "a.md").write_text("deep")
    assert [document.text for document in documents(tmp_path)] == ["deep"]
    (path / "a.md").unlink()
    for _ in range(depth):  # pytest's own clean-up recurses
        path.rmdir()
        path = path.parent


def test_a_folder_beyond_the_longest_path_is_refused_in_one_line(tmp_path):
    descriptors = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=descriptors[-1])
        descriptors.append(os.open("x" * 250, os.O_RDONLY, dir_fd=descriptors[-1]))
    for descriptor in descriptors:
        os.close(descriptor)
    with pytest.raises(CorpusError, match="File name too long") as caught:
        documents(tmp_path)
    assert len(str(caught.value)) < 500


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.txt")).write_text("text")
    corpus = open_corpus(str(folder))
    (document,) = corpus.documents()
    assert document == Document("\\xe9.txt:0", "text")
    assert corpus.name.endswith("/f\\xff")
    canonical([corpus.name, document.name])
    with pytest.raises(CorpusError, match="expected") as caught:
        open_corpus(str(folder / os.fsdecode(b"\xe9.bin")))
    assert str(caught.value).encode()


def test_files_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    for name in (
        "b/a.md",
        "b.md",
        "b-a.md",
        "a/z.md",
        "a.md",
        "B/x.md",
        "b/.hidden.md",
        "b/__pycache__/x.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    want = [
        path.relative_to(tmp_path).as_posix()
        for path in sorted(tmp_path.rglob("*.md"))
        if "hidden" not in path.name and "__pycache__" not in path.parts
    ]
    assert [document.text for document in documents(tmp_path)] == want


@pytest.mark.slow
def test_twenty_megabytes_in_one_document_take_less_than_two_gigabytes(tmp_path, tokenizer):
    """Peak memory only grows, so that it is compared with what this process had before."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.md").write_text(" ".join(rng.choice(["layer", "state", "flows\n"], 4 * 10**6)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    encode = text_encoder(tokenizer)
    made = Packing(open_corpus(str(tmp_path / "a.md")), encode, 0, 512, {"train": 10**6, "validation": 10**6})
    assert sum(1 for _ in made) > 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kilobytes
