"""A row of a table as a document: a text, a chat, or tokens that were made before."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from lftpipe.base.errors import CorpusError

#: Columns that are taken where none is named: of texts, of a chat's messages, of token ids.
COLUMNS = ("text", "content", "messages", "input_ids")

#: What names another column.
_CURE = "name the column of the text with --text-field"


class Document(NamedTuple):
    """One text, chat or list of tokens that is never split between train and validation."""

    name: str
    text: str
    """Decides the split; of a chat or of tokens it is their JSON."""
    chat: list[dict[str, Any]] | None = None
    """Messages with a role each, for the tokenizer's template."""
    tokens: list[int] | None = None


def column_of(columns: Iterable[Any], field: str | None, where: str) -> str:
    """Which of a table's columns holds the documents.

    `field`: the one that `--text-field` names; None takes the first of `COLUMNS` that is there.
    `where`: names the table in an error.
    """
    there = [str(column) for column in columns]
    wanted = COLUMNS if field is None else (field,)
    for column in wanted:
        if column in there:
            return column
    shown = ", ".join(there[:20]) or "none"
    raise CorpusError(f"{where} with columns {shown}", f"a column {' or '.join(wanted)}", _CURE)


def document_of(value: Any, name: str, where: str, most: int) -> Document:
    """What one row has in that column as a document; nothing is an empty one.

    `most`: characters that it may have, as text or JSON.
    """
    if value is None or value == []:
        return Document(name, "")
    if isinstance(value, str):
        # JSON can escape halves of surrogate pairs, which are no text in any encoding.
        text = value if value.isascii() else value.encode("utf-8", "replace").decode()
        document = Document(name, text)
    elif _is_tokens(value):
        document = Document(name, json.dumps(value), tokens=value)
    elif _is_chat(value):
        # A table gives every message every field, empty where it has none.
        chat = [{key: part for key, part in message.items() if part is not None} for message in value]
        document = Document(name, json.dumps(chat, sort_keys=True), chat=chat)
    else:
        kinds = "a text, token ids, or a chat of messages with a role each"
        raise CorpusError(f"{where} with {_shown(value)}", kinds, _CURE)
    if len(document.text) > most:
        raise too_large(where, most)
    return document


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in value
    )


def _shown(value: Any) -> str:
    """A value of another kind, so that one sees what it is."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return f"a list of objects with {', '.join(map(str, list(value[0])[:10])) or 'nothing'}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '…'}"


def too_large(where: str, most: int) -> CorpusError:
    """Of a document."""
    return CorpusError(
        f"{where}: a document of more than {most:,} bytes",
        "documents that are not larger",
        "cut it, or pass a larger --max-document-bytes",
    )
