"""Where text comes from: names, files, folders and Hub data sets, as a stream of documents.

A corpus is read front to back, one document at a time, in the same order every time; it is
never held in memory as a whole. What becomes of the text is `lftpipe.corpus.packing`'s business.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lftpipe.base import progress
from lftpipe.base.errors import CorpusError, foreign
from lftpipe.corpus.files import (
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    OTHER_TABLES,
    SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    UTF8,
    file_documents,
    is_saved,
    kind_of,
    saved_documents,
    shown,
)
from lftpipe.corpus.rows import Document, column_of, document_of

#: Names for corpora that many experiments share. The Pile's original host is gone; this copy
#: on the Hub is the one without the parts that were taken down for copyright.
REGISTERED = {"pile": "hf:monology/pile-uncopyrighted"}
PYTHON_STDLIB = "python-stdlib"


@dataclass(frozen=True)
class Corpus:
    """A named stream of documents that can be read again from the start.

    `local` corpora can be read again at little cost, so a resumed extraction checks that
    they still hold what they held.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    local: bool


def open_corpus(name: str, max_document_bytes: int = MAX_DOCUMENT_BYTES, field: str | None = None) -> Corpus:
    """Find the corpus called `name`; no text is read yet.

    `name`: a registered name, a file or folder, or `hf:<dataset>[:<config>[:<split>]]`.
    `max_document_bytes`: a larger document is an error; it only bounds the memory, as long ones are tokenised
    in parts.
    `field`: the column of tables that holds the documents; None takes the first usual one (`rows.COLUMNS`).
    Raises `CorpusError` if there is no such corpus, or it is of a kind that is not read.
    """
    most = max_document_bytes
    resolved = REGISTERED.get(name, name)
    if resolved == PYTHON_STDLIB:
        if field is not None:
            raise CorpusError(f"--text-field {field} with {name}", "a table", "leave out --text-field")
        return Corpus(PYTHON_STDLIB, _python_stdlib, local=True)
    if resolved.startswith("hf:"):
        parts = resolved.removeprefix("hf:").split(":")
        if not parts[0] or len(parts) > 3:
            raise CorpusError(f"corpus {name!r}", "hf:<dataset>[:<config>[:<split>]]", "use that format")
        return Corpus(resolved, lambda: _hub_documents(most, field, *parts), local=False)
    try:
        path = Path(resolved).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # a loop of links, an unknown ~user, a NUL
        raise CorpusError(
            f"corpus {name!r}", "a path that leads somewhere", f"correct it ({error})"
        ) from None
    if path.is_dir():
        return Corpus(shown(path), _reader_of_folder(path, most, field), local=True)
    if path.is_file():
        if not kind_of(path):
            raise CorpusError(
                f"corpus file {shown(path)}",
                f"one of {' '.join(SUFFIXES)}, plain or {' '.join(COMPRESSIONS)}",
                "convert or rename it",
            )
        called = shown(Path(path.name))
        return Corpus(shown(path), lambda: file_documents(path, called, most, field), local=True)
    raise CorpusError(
        f"corpus {name!r}",
        f"a registered name ({', '.join(sorted((*REGISTERED, PYTHON_STDLIB)))}), a file, a "
        "folder, or hf:<dataset>",
        "check the spelling and the path",
    )


def _reader_of_folder(folder: Path, most: int, field: str | None) -> Callable[[], Iterator[Document]]:
    """Reads a data set that `datasets` saved, or the files of the first kinds that the folder has.

    Tables in JSON and CSV are often something else than text: where a folder has other text, they are
    passed over, which a line says.
    """
    if is_saved(folder):
        return lambda: saved_documents(folder, most, field)
    texts = TEXT_SUFFIXES if field is None else ()  # a column means tables
    counts = Counter(kind_of(path) for path in _files(folder))
    kinds = (*texts, *TABLE_SUFFIXES)
    others = [f"{counts[kind]} {kind}" for kind in OTHER_TABLES if counts[kind]]
    if not any(counts[kind] for kind in kinds):
        kinds = OTHER_TABLES
    elif others:
        how = "name one of them" if field else "name one of them, or its column with --text-field"
        progress.say(f"note: {', '.join(others)} files of {shown(folder)} are not read: {how}")

    def documents() -> Iterator[Document]:
        for path in _files(folder):
            if kind_of(path) in kinds and path.is_file():
                yield from file_documents(path, shown(path.relative_to(folder)), most, field)

    return documents


def _files(folder: Path) -> Iterator[Path]:
    """All that is in a folder and is not hidden, however deep, in the order of the paths.

    Links to folders are not followed, as they may lead in a circle.
    """
    stack = [folder]
    while stack:
        path = stack.pop()
        try:
            if path == folder or (path.is_dir() and not path.is_symlink()):
                with os.scandir(path) as entries:
                    names = sorted(entry.name for entry in entries)
                stack += [path / name for name in reversed(names) if name[0] != "." and name != "__pycache__"]
            else:
                yield path
        except OSError as error:
            text = shown(path)
            named = text if len(text) < 200 else f"{text[:100]}...{text[-80:]}"
            raise CorpusError(
                f"corpus folder {named} ({error.strerror})",
                "folders that can be read",
                "move or unlock it, or name another folder",
            ) from None


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
            yield Document(relative.as_posix(), path.read_text(encoding=UTF8))
        except UnicodeDecodeError:
            continue


def _hub_documents(
    most: int, field: str | None, dataset: str, config: str | None = None, split: str = "train"
) -> Iterator[Document]:
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    hub_logging.set_verbosity_error()  # its retries would come before the one line that says it all
    wanted = "a data set that the Hugging Face Hub serves to this machine"
    cure = "check the name and the network, or pass a local file or folder with --corpus"
    with foreign(CorpusError, f"corpus hf:{dataset}", wanted, cure):
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            where = f"hf:{dataset}, row {number}"
            value = row[column_of(row, field, where)]
            yield document_of(value, f"{dataset}:{number}", where, most)
