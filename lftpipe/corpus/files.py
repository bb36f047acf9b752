"""One corpus file as documents: text, JSON lines or Parquet, plain or compressed, in bounded memory.

Files come from anywhere. One that unpacks to far more than it is, or holds a document larger than
`max_document_bytes`, is refused before it takes the memory or the disk.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from lftpipe.base.errors import CorpusError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content")

#: A `.txt` file is most often a concatenation of works. It is cut at line ends into documents
#: of about this many characters, so that one file can be split into train and validation;
#: where a line is longer than that, inside it.
TXT_DOCUMENT_CHARACTERS = 16_384

#: UTF-8, with or without the byte-order mark that some editors put before it.
UTF8 = "utf-8-sig"

#: More than any book has.
MAX_DOCUMENT_BYTES = 64 * 2**20

#: Text is rarely more than ten times as large as its archive. One that unpacks to so many times its size,
#: and to so many bytes, was made to fill a memory or a disk.
UNPACKED_TIMES, UNPACKED_BYTES = 200, 256 * 2**20

#: Rows of a Parquet file held at once.
_ROWS = 16


class Document(NamedTuple):
    """One text that is never split between train and validation."""

    name: str
    text: str


def kind_of(path: Path) -> str:
    """The suffix that says how to read `path`, without a compression's; '' if none is known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return suffix if suffix in TEXT_SUFFIXES + TABLE_SUFFIXES else ""


def shown(path: Path) -> str:
    """A path as text that any terminal and file takes: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_documents(path: Path, name: str, max_document_bytes: int) -> Iterator[Document]:
    """The documents of a file.

    Parameters
    ----------
    max_document_bytes
        Size of the largest document that is accepted, in UTF-8.

    Raises
    ------
    CorpusError
        If the file is damaged, no text, or too large to be read.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, name, max_document_bytes)
        elif kind == ".jsonl":
            yield from _jsonl_documents(path, name, max_document_bytes)
        else:
            yield from _text_documents(path, name, max_document_bytes, cut=kind == ".txt")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError) as error:  # damaged, or vanished
        raise CorpusError(f"corpus file {shown(path)}", "a readable file", f"check it ({error})") from error


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    # All frames of the file, and an error where it was cut short: other readers stop silently.
    return pa.CompressedInputStream(pa.OSFile(os.fsencode(path)), "zstd")  # pyright: ignore


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


class _Unpacked(io.RawIOBase):
    """What comes out of an archive, until it is absurdly much."""

    def __init__(self, path: Path, content: Any) -> None:
        self._path, self._content = path, content
        self._most = max(UNPACKED_TIMES * path.stat().st_size, UNPACKED_BYTES)
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read(len(buffer))
        self._bytes += len(data)
        if self._bytes > self._most:
            raise CorpusError(
                f"corpus file {shown(self._path)} that unpacks to more than {UNPACKED_TIMES} times its size",
                "an archive of text",
                "unpack it yourself, or take it out of the corpus",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._content.close()
        super().close()


def _open(path: Path) -> Any:
    """A binary file, decompressed as it is read."""
    if (suffix := path.suffix.lower()) in COMPRESSIONS:
        return io.BufferedReader(_Unpacked(path, COMPRESSIONS[suffix](path)), 2**17)
    return path.open("rb")


def _text_documents(path: Path, name: str, most: int, *, cut: bool) -> Iterator[Document]:
    """A text file as one document, or cut at the first line end after so many characters."""
    parts: list[str] = []
    size = number = 0
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding=UTF8, newline="") as file:
            while line := file.readline(TXT_DOCUMENT_CHARACTERS):  # a bound, as some files have no lines
                if "\0" in line:
                    raise _no_text(path)
                parts.append(line)
                size += len(line)
                if cut and size >= TXT_DOCUMENT_CHARACTERS:
                    yield Document(f"{name}:{number}", "".join(parts))
                    parts, size, number = [], 0, number + 1
                elif size > most:
                    raise _too_large(f"corpus file {shown(path)}", most)
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    if parts:
        yield Document(f"{name}:{number}" if cut else name, "".join(parts))


def _no_text(path: Path) -> CorpusError:
    return CorpusError(f"corpus file {shown(path)}", "UTF-8 text", "convert it, or take it out of the corpus")


def _too_large(where: str, most: int) -> CorpusError:
    return CorpusError(
        f"{where}: a document of more than {most:,} bytes",
        "documents that are not larger",
        "cut it, or pass a larger --max-document-bytes",
    )


def _jsonl_documents(path: Path, name: str, most: int) -> Iterator[Document]:
    number = -1
    with _open(path) as file:
        # A line has more than its text: names, escapes, other fields.
        while line := file.readline(4 * most + 1):
            number += 1
            where = f"{shown(path)}, line {number + 1}"
            if len(line) > 4 * most:
                raise _too_large(where, most)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(where, "one JSON object a line", "correct that line") from error
            yield Document(f"{name}:{number}", text_of(row, where, most))


def _parquet_documents(path: Path, name: str, most: int) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _seekable(path) as content, pq.ParquetFile(content) as table:
            columns = [column for column in TEXT_COLUMNS if column in table.schema_arrow.names][:1]
            if not columns:
                raise CorpusError(
                    f"{shown(path)} with columns {', '.join(table.schema_arrow.names)}",
                    f"a column named {' or '.join(TEXT_COLUMNS)}",
                    "rename the column",
                )
            _check_size(path, table)
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for row in batch.column(0):
                    where = f"{shown(path)}, row {number}"
                    yield Document(f"{name}:{number}", text_of({columns[0]: row.as_py()}, where, most))
                    number += 1
    except UnicodeDecodeError as error:
        raise CorpusError(f"{shown(path)}, row {number}", "UTF-8 text", "correct that row") from error
    except pa.ArrowException as error:
        reason = str(error).strip().partition("\n")[0]
        raise CorpusError(f"corpus file {shown(path)}", "a Parquet file", f"correct it ({reason})") from error


def _check_size(path: Path, table: Any) -> None:
    """Refuse a file that says itself that it unpacks to absurdly much."""
    groups = (table.metadata.row_group(i) for i in range(table.metadata.num_row_groups))
    unpacked = sum(
        max(group.column(i).total_uncompressed_size for i in range(group.num_columns)) for group in groups
    )
    if unpacked > max(UNPACKED_TIMES * path.stat().st_size, UNPACKED_BYTES):
        raise CorpusError(
            f"corpus file {shown(path)} that unpacks to more than {UNPACKED_TIMES} times its size",
            "a table of text",
            "write it anew with smaller rows, or take it out of the corpus",
        )


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The file, or its decompressed content: Parquet is read from its end."""
    with _open(path) as content:
        if path.suffix.lower() not in COMPRESSIONS:
            yield content
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(content, copy)
            yield copy


def text_of(row: Any, where: str, most: int = MAX_DOCUMENT_BYTES) -> str:
    """The text of a row; one that is null is empty.

    Raises
    ------
    CorpusError
        If it has no text, or too much.
    """
    for column in TEXT_COLUMNS:
        if isinstance(row, dict) and column in row:
            text = row[column] or ""
            if isinstance(text, str):
                if len(text) > most:
                    raise _too_large(where, most)
                # JSON can escape halves of surrogate pairs, which are no text in any encoding.
                return text.encode("utf-8", "replace").decode() if not text.isascii() else text
    raise CorpusError(where, f"a text under {' or '.join(TEXT_COLUMNS)}", "rename the field")
