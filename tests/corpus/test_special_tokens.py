"""Special tokens come from us alone, once: what a document's text spells is text."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import extracted
from tokenizers.processors import TemplateProcessing

from lftpipe.store import Store
from lftpipe.teacher.source import load_tokenizer, open_teacher, opening, text_encoder

CODE = ['END = "<|endoftext|>"\n', "tokens = text.split('<|endoftext|>')\n" * 3, "<|endoftext|>"]


@pytest.fixture
def folder(teachers: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the GPT-NeoX teacher, to change its tokenizer."""
    return Path(shutil.copytree(teachers["neox"], tmp_path / "changed"))


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(open_teacher(str(folder), Path("unused")))


def change(folder: Path, **parts: Any) -> None:
    """Other parts of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def tokens_of(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """All training tokens, and the document of each."""
    tokens, document = store.tokens("train"), store.document("train")
    return np.ravel(tokens), np.ravel(document)


def template(folder: Path, single: str) -> None:
    """A tokenizer that puts tokens around every text."""
    backend = tokenizer_of(folder).backend_tokenizer
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<|endoftext|>", 0)])
    backend.save(str(folder / "tokenizer.json"))


def test_a_control_token_that_a_document_spells_is_text(tokenizer: Any) -> None:
    encode = text_encoder(tokenizer)
    for text, ids in zip(CODE, encode(CODE), strict=True):
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    tokenizer("a call of transformers, which takes control tokens as such: <|endoftext|>")
    assert 0 not in encode(CODE)[2]


def test_a_text_without_control_tokens_has_the_tokens_that_transformers_gives_it(tokenizer: Any) -> None:
    texts = ["the state of a layer", "a < b |> c\n\n\t", "<| endoftext |>", "é 😀"]
    assert text_encoder(tokenizer)(texts) == tokenizer(texts)["input_ids"]


def test_a_store_of_code_ends_documents_only_where_they_end(
    tmp_path: Path, teachers: dict[str, Path]
) -> None:
    (tmp_path / "code").mkdir()
    for number in range(60):
        (tmp_path / "code" / f"{number}.py").write_text(f"# {number}\n" + "".join(CODE) * (1 + number % 3))
    store = Store.open(extracted(tmp_path, teachers["neox"], tmp_path / "code", tokens_only=True))
    ends, documents = tokens_of(store)
    last = np.flatnonzero(np.diff(documents))
    assert len(last) > 4
    assert np.flatnonzero(ends[:-1] == 0).tolist() == last.tolist()


@pytest.mark.parametrize(
    ("single", "begins"),
    [
        ("$A <|endoftext|>", []),
        ("<|endoftext|> $A <|endoftext|>", [0]),
        ("<|endoftext|> <|endoftext|> $A", [0, 0]),
    ],
)
def test_a_tokenizer_that_ends_texts_itself_ends_no_document_twice(
    folder: Path, text_folder: Path, tmp_path: Path, single: str, begins: list[int]
) -> None:
    plain = Store.open(extracted(tmp_path / "plain", folder, text_folder, tokens_only=True))
    template(folder, single)
    assert opening(tokenizer_of(folder)) == begins
    store = Store.open(extracted(tmp_path / "closing", folder, text_folder, tokens_only=True))
    counts = []
    for each in (plain, store):
        tokens, document = tokens_of(each)
        counts.append([(tokens[document == number] == 0).sum() for number in np.unique(document)[:20]])
    assert counts[1] == [count + len(begins) for count in counts[0]]


def test_texts_of_a_document_are_neither_cut_nor_filled_up(folder: Path, tokenizer: Any) -> None:
    texts = ["the state", "the state of a layer flows into the next " * 20]
    backend = tokenizer_of(folder).backend_tokenizer
    backend.enable_padding(pad_id=3, pad_token="x", length=300)
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    assert text_encoder(tokenizer_of(folder))(texts) == tokenizer(texts)["input_ids"]
