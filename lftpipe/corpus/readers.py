"""Where text comes from: names, files, folders and Hub data sets, as a stream of documents.

A corpus is read front to back, one document at a time, in the same order every time; it is
never held in memory as a whole. What becomes of the text is `lftpipe.corpus.packing`'s business.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from lftpipe.errors import CorpusError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content")

#: Names for corpora that many experiments share. The Pile's original host is gone; this copy
#: on the Hub is the one without the parts that were taken down for copyright.
REGISTERED = {"pile": "hf:monology/pile-uncopyrighted"}
PYTHON_STDLIB = "python-stdlib"

#: A `.txt` file is most often a concatenation of works. It is cut at line ends into documents
#: of about this many characters, so that one file can be split into train and validation;
#: where a line is longer than that, inside it.
TXT_DOCUMENT_CHARACTERS = 16_384


class Document(NamedTuple):
    """One text that is never split between train and validation."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named stream of documents that can be read again from the start.

    `local` corpora can be read again at little cost, so a resumed extraction checks that
    they still hold what they held.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    local: bool


def open_corpus(name: str) -> Corpus:
    """Find the corpus called `name`; nothing is read yet.

    Parameters
    ----------
    name
        A registered name, a file or folder, or `hf:<dataset>[:<config>[:<split>]]`.

    Raises
    ------
    CorpusError
        If there is no such corpus, or it is of a kind that is not read.
    """
    resolved = REGISTERED.get(name, name)
    if resolved == PYTHON_STDLIB:
        return Corpus(PYTHON_STDLIB, _python_stdlib, local=True)
    if resolved.startswith("hf:"):
        parts = resolved.removeprefix("hf:").split(":")
        if not parts[0] or len(parts) > 3:
            raise CorpusError(f"corpus {name!r}", "hf:<dataset>[:<config>[:<split>]]", "write it so")
        return Corpus(resolved, lambda: _hub_documents(*parts), local=False)
    path = Path(resolved).expanduser().resolve()
    if path.is_dir():
        return Corpus(str(path), lambda: _folder_documents(path), local=True)
    if path.is_file():
        if not _kind(path):
            raise CorpusError(
                f"corpus file {path}",
                f"one of {' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}, plain or {' '.join(COMPRESSIONS)}",
                "convert or rename it",
            )
        return Corpus(str(path), lambda: _file_documents(path), local=True)
    raise CorpusError(
        f"corpus {name!r}",
        f"a registered name ({', '.join(sorted((*REGISTERED, PYTHON_STDLIB)))}), a file, a "
        "folder, or hf:<dataset>",
        "check the spelling and the path",
    )


def _kind(path: Path) -> str:
    """The suffix that says how to read `path`, without a compression's; '' if none is known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return suffix if suffix in TEXT_SUFFIXES + TABLE_SUFFIXES else ""


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    # All frames of the file, and an error where it was cut short: other readers stop silently.
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # pyright: ignore


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _open(path: Path) -> Any:
    """A binary file, decompressed as it is read."""
    return COMPRESSIONS.get(path.suffix.lower(), lambda plain: plain.open("rb"))(path)


def _file_documents(path: Path, name: str | None = None) -> Iterator[Document]:
    name = name or path.name
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, name)
        elif kind == ".jsonl":
            yield from _jsonl_documents(path, name)
        else:
            yield from _text_documents(path, name, cut=kind == ".txt")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # damaged archives, vanished files
        raise CorpusError(f"corpus file {path}", "a readable file", f"mend it ({error})") from error


def _text_documents(path: Path, name: str, *, cut: bool) -> Iterator[Document]:
    """A text file as one document, or cut at the first line end after so many characters."""
    pieces: list[str] = []
    size = number = 0
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            while line := file.readline(TXT_DOCUMENT_CHARACTERS):  # a bound, as some files have no lines
                if "\0" in line:
                    raise _no_text(path)
                pieces.append(line)
                size += len(line)
                if cut and size >= TXT_DOCUMENT_CHARACTERS:
                    yield Document(f"{name}:{number}", "".join(pieces))
                    pieces, size, number = [], 0, number + 1
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    if pieces:
        yield Document(f"{name}:{number}" if cut else name, "".join(pieces))


def _no_text(path: Path) -> CorpusError:
    return CorpusError(f"corpus file {path}", "UTF-8 text", "convert it, or take it out of the corpus")


def _jsonl_documents(path: Path, name: str) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(
                    f"{path}, line {number + 1}", "one JSON object a line", "mend that line"
                ) from error
            yield Document(f"{name}:{number}", _text_of(row, f"{path}, line {number + 1}"))


def _parquet_documents(path: Path, name: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _seekable(path) as content, pq.ParquetFile(content) as table:
            columns = [column for column in TEXT_COLUMNS if column in table.schema_arrow.names][:1]
            if not columns:
                raise CorpusError(
                    f"{path} with columns {', '.join(table.schema_arrow.names)}",
                    f"a column named {' or '.join(TEXT_COLUMNS)}",
                    "rename the column",
                )
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{name}:{number}", _text_of({columns[0]: text}, f"{path}, row {number}"))
                    number += 1
    except pa.ArrowInvalid as error:
        raise CorpusError(f"corpus file {path}", "a Parquet file", f"mend it ({error})") from error


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


def _text_of(row: Any, where: str) -> str:
    """The text of a row; one that is null is empty."""
    for column in TEXT_COLUMNS:
        if isinstance(row, dict) and column in row:
            text = row[column] or ""
            if isinstance(text, str):
                # JSON can escape halves of surrogate pairs, which are no text in any encoding.
                return text.encode("utf-8", "replace").decode() if not text.isascii() else text
    raise CorpusError(where, f"a text under {' or '.join(TEXT_COLUMNS)}", "rename the field")


def _folder_documents(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not hidden and _kind(path) and path.is_file():
            yield from _file_documents(path, relative.as_posix())


def _python_stdlib() -> Iterator[Document]:
    """The sources of the running interpreter's standard library, in order of their paths.

    A few of its test files are in other encodings on purpose; those are passed over.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if re.search(r"(^|/)(site-packages|dist-packages|__pycache__)(/|$)", relative.as_posix()):
            continue
        try:
            yield Document(relative.as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue


def _hub_documents(dataset: str, config: str | None = None, split: str = "train") -> Iterator[Document]:
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    hub_logging.set_verbosity_error()  # its retries would come before the one line that says it all
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield Document(f"{dataset}:{number}", _text_of(row, f"hf:{dataset}, row {number}"))
    except CorpusError:
        raise
    except Exception as error:  # whatever the data set's files, their readers and the network come up with
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"corpus hf:{dataset} ({reason})",
            "a data set that the Hugging Face Hub serves to this machine",
            "check the name and the network, or pass a local file or folder with --corpus",
        ) from error
