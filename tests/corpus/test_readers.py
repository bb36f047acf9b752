import abc
import bz2
import gzip
import itertools
import json
import lzma
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.base.errors import CorpusError
from lftpipe.corpus import files as corpus_module
from lftpipe.corpus.files import TXT_DOCUMENT_CHARACTERS
from lftpipe.corpus.readers import open_corpus
from lftpipe.corpus.rows import Document


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TEXTS = ["first é\n", "second\r\nline\n", "third"]


def texts(path: Path | str) -> list[str]:
    return [document.text for document in open_corpus(str(path)).documents()]


def content(kind: str) -> tuple[bytes, list[str]]:
    """Bytes of a small file of each kind, and the documents in it."""
    if kind == ".jsonl":
        return "".join(json.dumps({"text": text, "id": 1}) + "\n\n" for text in TEXTS).encode(), TEXTS
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": [1, 2, 3], "content": TEXTS}), sink)
        return sink.getvalue().to_pybytes(), TEXTS
    return "".join(TEXTS).encode(), ["".join(TEXTS)]


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_its_texts(tmp_path, kind, compression):
    data, expected = content(kind)
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](data) if compression else data)
    assert texts(path) == expected
    assert texts(tmp_path) == expected


@pytest.mark.parametrize("compression", COMPRESS)
def test_an_archive_in_several_parts_is_read_to_its_end(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b"".join(COMPRESS[compression](b'{"text": "%d"}\n' % i) for i in range(3)))
    assert texts(path) == ["0", "1", "2"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_a_damaged_archive_is_refused_not_cut_short(tmp_path, compression, damage):
    data = COMPRESS[compression](b"".join(b"%d words of text\n" % i for i in range(5000)))
    middle = len(data) // 2
    broken = {
        "truncated": data[:-8],
        "garbage": b"no archive at all, but text",
        "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
    }
    if (compression, damage) == (".zst", "flipped"):
        broken["flipped"] = data[:4] + b"\xff" * 20 + data[24:]  # pyarrow writes no checksums
    path = tmp_path / f"a.md{compression}"
    path.write_bytes(broken[damage])
    with pytest.raises(CorpusError, match=rf"corpus file .*a\.md{compression} / expected: .* / do: "):
        texts(path)


def test_a_folder_is_read_in_the_order_of_its_paths_without_hidden_and_foreign_files(tmp_path):
    for name in (
        "b/z.md",
        "a.py",
        "b/a.txt",
        "B.md",
        "b/.hidden/x.md",
        ".x.md",
        "b/__pycache__/x.py",
        "c.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [document.name for document in open_corpus(str(tmp_path)).documents()]
    assert names == ["B.md", "a.py", "b/a.txt:0", "b/z.md"]
    assert texts(tmp_path) == texts(tmp_path) == ["B.md", "a.py", "b/a.txt", "b/z.md"]


@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl"])
def test_an_empty_file_has_no_documents(tmp_path, kind):
    (tmp_path / f"a{kind}").touch()
    assert texts(tmp_path) == []


@pytest.mark.parametrize(
    "data", [b"\x7fELF\x02\x00\x00", b"\xff\xfe\x00a", b"latin \xe9", b"a\0b", b"cut \xc3"]
)
@pytest.mark.parametrize("kind", [".txt", ".py"])
def test_a_binary_file_is_refused(tmp_path, kind, data):
    path = tmp_path / f"a{kind}"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"expected: UTF-8 text / do: convert it"):
        texts(path)


def test_a_binary_table_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x7fELF\x02\xff\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1 / expected: one JSON object a line"):
        texts(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.parquet").write_bytes(b"\x7fELF\x02\xff\n" * 20)
    with pytest.raises(CorpusError, match=r"a\.parquet / expected: a Parquet file"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 2 / expected: one JSON object a line, or an array of them / do: correct it"),
        ('{"text": "cut', "line 2 / expected: one JSON object a line, or an array of them / do: correct it"),
        ('"only a string"', "line 2 / expected: one JSON object a line"),
        ('{"body": "x"}', "line 2 with columns body / expected: a column text or content"),
        ('{"text": 3}', "line 2 with int 3 / expected: a text, token ids, or a chat"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    documents = open_corpus(str(path)).documents()
    assert next(documents).text == "good"
    with pytest.raises(CorpusError, match=message):
        next(documents)


@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, kind):
    data, expected = content(kind)
    (tmp_path / f"a{kind}").write_bytes(b"\xef\xbb\xbf" + data)
    (tmp_path / f"b{kind}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + data))
    assert texts(tmp_path) == expected * 2
    (tmp_path / f"a{kind}").write_bytes(data.replace(b"second", b"\xef\xbb\xbfsecond"))
    assert "\ufeffsecond" in "".join(texts(tmp_path / f"a{kind}"))  # elsewhere it is a character of the text


def test_a_byte_order_mark_of_a_library_file_is_no_text(tmp_path, monkeypatch):
    (tmp_path / "marked.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert texts("python-stdlib") == ["x = 1\n"]


def test_a_null_text_is_empty_in_every_kind_of_table(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    pq.write_table(pa.table({"text": pa.array([None, "x"], pa.large_string())}), tmp_path / "b.parquet")
    assert texts(tmp_path) == ["", "", "x"]


def test_every_text_of_a_table_can_be_encoded(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "half \ud83d a pair, whole \ud83d\ude00"}')
    assert texts(tmp_path)[0].encode() == "half ? a pair, whole 😀".encode()


def test_parquet_without_a_text_column_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="with columns body / expected: a column text or content"):
        texts(tmp_path)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="row 0 with int 1 / expected: a text, token ids"):
        texts(tmp_path)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), max_size=30))
def test_cutting_a_txt_file_loses_nothing(tmp_path_factory, lines):
    text = "\n".join(lines)
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "TXT_DOCUMENT_CHARACTERS", 50)
        documents = texts(path)
    assert "".join(documents) == text
    assert all(0 < len(document) < 100 for document in documents)
    assert all(len(document) >= 50 for document in documents[:-1])


def test_a_txt_file_is_cut_at_line_ends_and_another_is_not(tmp_path):
    text = "a line of text\n" * 5000
    (tmp_path / "a.txt").write_text(text)
    documents = texts(tmp_path)
    assert len(documents) == len(text) // TXT_DOCUMENT_CHARACTERS + 1
    assert all(document.endswith("\n") for document in documents)
    (tmp_path / "a.txt").rename(tmp_path / "a.md")
    assert texts(tmp_path) == [text]


def test_an_endless_line_is_never_held_whole(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 10 * TXT_DOCUMENT_CHARACTERS)
    assert {len(document) for document in texts(tmp_path)} == {TXT_DOCUMENT_CHARACTERS}


def test_python_stdlib_is_the_running_interpreters_and_always_the_same():
    def first(count: int) -> list[Document]:
        return list(itertools.islice(open_corpus("python-stdlib").documents(), count))

    documents = first(60)
    assert documents == first(60)
    names = [document.name for document in documents]
    assert "abc.py" in names
    assert "argparse.py" in names
    assert not any("site-packages" in name for name in names)
    assert documents[names.index("abc.py")].text == Path(abc.__file__).read_text()


class FakeHub:
    """Stands in for the `datasets` package, at the one function that is called."""

    def __init__(self, rows=(), error: Exception | None = None) -> None:
        self.rows, self.error, self.calls = rows, error, []

    def load_dataset(self, *arguments, **options):
        self.calls.append((arguments, options))
        if self.error:
            raise self.error
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch):
    def install(**given) -> FakeHub:
        fake = FakeHub(**given)
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fake.load_dataset))
        return fake

    return install


@pytest.mark.parametrize(
    ("name", "arguments", "split"),
    [
        ("hf:org/set", ("org/set", None), "train"),
        ("hf:org/set:en", ("org/set", "en"), "train"),
        ("hf:org/set:en:test", ("org/set", "en"), "test"),
        ("hf:org/set::test", ("org/set", None), "test"),
        ("pile", ("monology/pile-uncopyrighted", None), "train"),
    ],
)
def test_a_hub_data_set_is_streamed(hub, name, arguments, split):
    def rows():
        yield {"text": "one"}
        yield {"content": "two"}
        raise AssertionError("read further than asked for")

    fake = hub(rows=rows())
    documents = open_corpus(name).documents()
    assert [next(documents).text, next(documents).text] == ["one", "two"]
    assert fake.calls == [(arguments, {"split": split, "streaming": True})]


class ClientError(Exception):
    """Of a network library that derives its errors from nothing in particular."""


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach\nthe Hub"), ValueError("Unknown split"), ClientError("reset")]
)
def test_a_hub_out_of_reach_is_one_line_with_the_cure(hub, error):
    hub(error=error)
    with pytest.raises(
        CorpusError, match=r"hf:org/set \([^\n]*\) / expected: .* / do: check the name and the"
    ):
        texts("hf:org/set")


def test_a_connection_lost_on_the_way_is_told_too(hub):
    def rows():
        yield {"text": "one"}
        raise ClientError

    hub(rows=rows())
    with pytest.raises(CorpusError, match=r"hf:org/set \(ClientError\)"):
        texts("hf:org/set")


def test_a_hub_data_set_without_text_is_refused(hub):
    hub(rows=[{"image": b""}])
    with pytest.raises(CorpusError, match="hf:org/set, row 0 with columns image / expected: a column text"):
        texts("hf:org/set")


@pytest.mark.parametrize("name", ["hf:", "hf::en", "hf:a:b:c:d"])
def test_a_misspelt_hub_name_is_refused(name):
    with pytest.raises(CorpusError, match=r"expected: hf:<dataset>\[:<config>\[:<split>\]\]"):
        open_corpus(name)


def test_an_unknown_name_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(CorpusError, match=r"corpus 'pille' .*pile, python-stdlib.* / do: check the spelling"):
        open_corpus("pille")
    (tmp_path / "a.docx").touch()
    with pytest.raises(CorpusError, match=r"a\.docx / expected: one of \.txt .* / do: convert or rename it"):
        open_corpus(str(tmp_path / "a.docx"))
