"""One corpus file as documents: a text or a table of rows, plain or compressed, in bounded memory.

Files come from anywhere. One that unpacks to far more than it is, or holds a document larger than
`max_document_bytes`, is refused before it takes the memory or the disk.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lftpipe.base.errors import CorpusError, foreign
from lftpipe.corpus.rows import Document, column_of, document_of, too_large

TEXT_SUFFIXES = (".txt", ".md", ".py")

#: Tables of documents; then those that a folder of other text may have for other reasons.
TABLE_SUFFIXES = (".jsonl", ".parquet")
OTHER_TABLES = (".json", ".csv", ".tsv", ".arrow")

SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES + OTHER_TABLES

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


def kind_of(path: Path) -> str:
    """The suffix that says how to read `path`, without a compression's; '' if none is known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def shown(path: Path) -> str:
    """A path as text that any terminal and file takes: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_documents(
    path: Path, name: str, max_document_bytes: int, field: str | None = None
) -> Iterator[Document]:
    """The documents of a file.

    `max_document_bytes`: size of the largest document that is accepted, in UTF-8.
    `field`: the column of a table that holds them; None takes the first usual one.
    Raises `CorpusError` if the file is damaged, no text, or too large to be read, or a table without such a
    column.
    """
    kind = kind_of(path)
    try:
        if kind in TEXT_SUFFIXES:
            if field is not None:
                raise CorpusError(
                    f"--text-field {field} with {shown(path)}", "a table", "leave out --text-field"
                )
            yield from _text_documents(path, name, max_document_bytes, cut=kind == ".txt")
        else:
            yield from _TABLES[kind](path, name, max_document_bytes, field)
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
                    raise too_large(f"corpus file {shown(path)}", most)
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    if parts:
        yield Document(f"{name}:{number}" if cut else name, "".join(parts))


def _no_text(path: Path) -> CorpusError:
    return CorpusError(f"corpus file {shown(path)}", "UTF-8 text", "convert it, or take it out of the corpus")


def _json_documents(path: Path, name: str, most: int, field: str | None) -> Iterator[Document]:
    """JSON with one object a line, or with all of them in one array."""
    with _open(path) as file:
        starts = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        rows = _array_rows if starts == b"[" else _line_rows
        for number, where, row in rows(file, path, most):
            if not isinstance(row, dict):
                raise CorpusError(where, "one JSON object a line, or an array of them", "correct it")
            value = row[column_of(row, field, where)]
            yield document_of(value, f"{name}:{number}", where, most)


def _line_rows(file: io.BufferedReader, path: Path, most: int) -> Iterator[tuple[int, str, Any]]:
    """Each line that is not blank: its number, where it is, and its value."""
    number = -1
    # A line has more than its text: names, escapes, other fields.
    while line := file.readline(4 * most + 1):
        number += 1
        where = f"{shown(path)}, line {number + 1}"
        if len(line) > 4 * most:
            raise too_large(where, most)
        if not line.strip():
            continue
        try:
            yield number, where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(where, "one JSON object a line, or an array of them", "correct it") from error


def _array_rows(file: io.BufferedReader, path: Path, most: int) -> Iterator[tuple[int, str, Any]]:
    """The items of an array, decoded one by one: together they may be larger than the memory."""
    with io.TextIOWrapper(file, encoding=UTF8) as text:
        yield from _items(text, path, most)


#: What may be between the parts of a JSON text.
_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _items(text: io.TextIOWrapper, path: Path, most: int) -> Iterator[tuple[int, str, Any]]:
    spaces, decode = _WHITESPACE.match, json.JSONDecoder().raw_decode
    buffer, at, number, before = "", 0, 0, "["
    while True:
        where = f"{shown(path)}, row {number}"
        at = spaces(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]: it matches nothing, too
        if buffer[at : at + 1] == before:
            start = spaces(buffer, at + 1).end()  # pyright: ignore[reportOptionalMemberAccess]
            try:
                row, at = decode(buffer, start)
            except RecursionError as error:
                raise CorpusError(where, "an array of JSON objects", "correct it") from error
            except ValueError:
                pass  # it is not whole yet, or no JSON
            else:
                yield number, where, row
                number, before = number + 1, ","
                continue
        if re.match(r"\[\s*\]" if not number else r"\]", buffer[at:]):
            return
        # Twice as much each time: a long item is not looked at again and again.
        try:
            more = text.read(max(2**16, len(buffer) - at))
        except UnicodeDecodeError as error:
            raise _no_text(path) from error
        if len(buffer) - at > 4 * most:
            raise too_large(where, most)
        if not more:
            raise CorpusError(where, "an array of JSON objects", "correct it")
        buffer, at = buffer[at:] + more, 0


def _csv_documents(path: Path, name: str, most: int, field: str | None) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), 4 * most))  # of all the process; 128 KiB from the start
    line = 1
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding=UTF8, newline="") as file:
            dialect = "excel-tab" if kind_of(path) == ".tsv" else "excel"
            rows = csv.reader(_bounded_lines(file, path, most), dialect, strict=True)
            header = next(rows, [])
            column = header.index(column_of(header, field, shown(path)))
            for number, row in enumerate(rows):
                line = rows.line_num
                where = f"{shown(path)}, line {line}"
                if len(row) > column:
                    yield document_of(row[column], f"{name}:{number}", where, most)
                elif row:  # else it is blank
                    raise CorpusError(
                        f"{where} with {len(row)} of {len(header)} columns", "all", "correct it"
                    )
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    except csv.Error as error:
        raise CorpusError(f"{shown(path)} after line {line} ({error})", "a table", "correct it") from error


def _bounded_lines(file: io.TextIOWrapper, path: Path, most: int) -> Iterator[str]:
    while line := file.readline(4 * most + 1):
        if len(line) > 4 * most:
            raise too_large(shown(path), most)
        yield line


def _arrow_documents(path: Path, name: str, most: int, field: str | None) -> Iterator[Document]:
    import datasets

    where = shown(path)
    if path.suffix.lower() in COMPRESSIONS:
        raise CorpusError(f"corpus file {where}", "an Arrow file that is not compressed", "unpack it")
    with foreign(CorpusError, f"corpus file {where}", "an Arrow file as datasets writes it", "save it again"):
        rows = datasets.Dataset.from_file(os.fspath(path))
        yield from dataset_documents(rows, where, name, most, field)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, into this folder."""
    whole = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return whole or (folder / "dataset_dict.json").is_file()


def saved_documents(folder: Path, most: int, field: str | None) -> Iterator[Document]:
    """The documents of what `save_to_disk` wrote: of several splits those of `train`."""
    import datasets

    where, name = shown(folder), shown(Path(folder.name))
    with foreign(CorpusError, f"corpus {where}", "a data set that datasets loads", "save it again"):
        saved: Any = datasets.load_from_disk(os.fspath(folder))
        if isinstance(saved, datasets.DatasetDict):
            if "train" not in saved:
                splits = ", ".join(map(str, saved))
                raise CorpusError(
                    f"{where} with splits {splits}",
                    "train, or one of them",
                    f"name it: --corpus {where}/SPLIT",
                )
            saved = saved["train"]
        yield from dataset_documents(saved, where, name, most, field)


def dataset_documents(rows: Any, where: str, name: str, most: int, field: str | None) -> Iterator[Document]:
    """The documents of a `datasets.Dataset`; its other columns are not decoded."""
    column = column_of(rows.column_names, field, where)
    for number, row in enumerate(rows.select_columns([column])):
        yield document_of(row[column], f"{name}:{number}", f"{where}, row {number}", most)


def _parquet_documents(path: Path, name: str, most: int, field: str | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _seekable(path) as content, pq.ParquetFile(content) as table:
            column = column_of(table.schema_arrow.names, field, shown(path))
            _check_size(path, table)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
                for value in batch.column(0):
                    where = f"{shown(path)}, row {number}"
                    yield document_of(value.as_py(), f"{name}:{number}", where, most)
                    number += 1
    except UnicodeDecodeError as error:
        raise CorpusError(f"{shown(path)}, row {number}", "UTF-8 text", "correct that row") from error
    except pa.ArrowException as error:
        reason = str(error).strip().partition("\n")[0]
        raise CorpusError(f"corpus file {shown(path)}", "a Parquet file", f"correct it ({reason})") from error


_TABLES: dict[str, Callable[[Path, str, int, str | None], Iterator[Document]]] = {
    ".jsonl": _json_documents,
    ".json": _json_documents,
    ".csv": _csv_documents,
    ".tsv": _csv_documents,
    ".parquet": _parquet_documents,
    ".arrow": _arrow_documents,
}


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
