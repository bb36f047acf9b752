"""Tables as people have them: every kind of file, columns of other names, chats, tokens made before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONTEXT, extracted, text_of

from lftpipe.base.errors import CorpusError, LftpipeError, TeacherError
from lftpipe.corpus.readers import open_corpus
from lftpipe.corpus.rows import Document
from lftpipe.store import Store
from lftpipe.teacher.source import chat_encoder

BODIES = ['first, "quoted" é\nline\n', "second\r\n", "third"]


def documents(path: Path | str, field: str | None = None) -> list[Document]:
    return list(open_corpus(str(path), field=field).documents())


def texts(path: Path | str, field: str | None = None) -> list[str]:
    return [document.text for document in documents(path, field)]


def saved(column: str, folder: Path) -> Path:
    datasets.Dataset.from_dict({"id": [1, 2, 3], column: BODIES}).save_to_disk(str(folder))
    return folder


def written(column: str, path: Path) -> Path:
    """A table of three texts in a file of the path's kind."""
    rows: list[dict[str, Any]] = [{"id": number, column: body} for number, body in enumerate(BODIES)]
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        quoted = [
            mark.join(('"' + str(each).replace('"', '""') + '"') for each in row.values()) for row in rows
        ]
        path.write_bytes("\r\n".join([f"id{mark}{column}", *quoted, ""]).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        (file,) = saved(column, path.parent.with_name(f"{path.stem} saved")).glob("*.arrow")
        file.rename(path)
    return path


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_a_column_of_another_name_is_read_from_every_kind_of_table(tmp_path: Path, kind: str) -> None:
    # No name is a pattern.
    folder = tmp_path / "set [1] a*"
    folder.mkdir()
    path = written("body", folder / f"a{kind}")
    assert texts(path, "body") == BODIES
    assert texts(folder, "body") == BODIES
    with pytest.raises(CorpusError, match=r"columns id, body / .* / do: name the column .* --text-field"):
        texts(path)
    with pytest.raises(CorpusError, match=r"columns id, body / expected: a column nothing"):
        texts(path, "nothing")
    assert texts(written("content", folder / f"b{kind}")) == BODIES


def test_what_datasets_saved_is_read_and_of_several_splits_that_of_train(tmp_path: Path) -> None:
    whole = saved("body", tmp_path / "whole [1]")
    assert texts(whole, "body") == BODIES
    with pytest.raises(CorpusError, match="columns id, body"):
        texts(whole)
    rows: Any = datasets.load_from_disk(str(whole))
    splits: Any = {"test": rows.select([0]), "train": rows.select([2, 1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))  # pyright: ignore[reportArgumentType]
    assert texts(tmp_path / "dict", "body") == [BODIES[2], BODIES[1]]
    assert texts(tmp_path / "dict" / "test", "body") == [BODIES[0]]
    del splits["train"]
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "rest"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(CorpusError, match=r"with splits test / .* / do: name it: --corpus .*rest/SPLIT"):
        texts(tmp_path / "rest", "body")
    (whole / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"whole \[1\] \(.*\) / expected: a data set that datasets loads"):
        texts(whole, "body")


def test_a_large_array_is_decoded_item_by_item(tmp_path: Path) -> None:
    rows = [{"text": text_of(seed, 50), "other": [{"deep": seed}]} for seed in range(2000)]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(rows))
    found = open_corpus(str(tmp_path / "a.json")).documents()
    assert next(found).text == rows[0]["text"]
    assert [document.text for document in found] == [row["text"] for row in rows[1:]]
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"}', "row 1 / expected: an array of JSON objects"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', "row 1 / expected: an array of JSON objects"),
        ("a.json", '[{"text": "x"},]', "row 1 / expected: an array of JSON objects"),
        ("a.json", '[{"text": "x"}, 3]', "row 1 / expected: one JSON object a line, or an array"),
        ("a.json", '[{"text": ' + "[" * 100_000, "row 0 / expected: an array of JSON objects"),
        ("a.json", "{\n}", "line 1 / expected: one JSON object a line, or an array"),
        ("a.json", '{"data": [{"text": "x"}]}', "line 1 with columns data / expected: a column text or"),
        ("a.jsonl", '{"text": 3}', "line 1 with int 3 / expected: a text, token ids, or a chat"),
        (
            "a.jsonl",
            '{"text": [{"from": "x"}]}',
            "with a list of objects with from / expected: a text",
        ),
        ("a.csv", 'text\n"x', r"after line 1 \(unexpected end of data\) / expected: a table"),
        ("a.csv", "id,text\n1,x\n2\n", "line 3 with 1 of 2 columns"),
        ("a.csv", "", "with columns none / expected: a column text"),
        ("a.csv", "text\n" + "x" * 5000, "a document of more than 1,000 bytes"),
        ("a.csv", 'text\n"' + "x\n" * 5000 + '"', "a document of more than 1,000 bytes|field larger than"),
        ("a.json", '[{"text": "' + "x" * 5000 + '"}]', "a document of more than 1,000 bytes"),
        ("a.json", '[{"text": "' + "x" * 500_000, "a document of more than 1,000 bytes"),
        ("a.arrow", "no such thing", r"a.arrow \(.*\) / expected: an Arrow file as datasets writes it"),
        ("a.arrow.gz", "", "a.arrow.gz / expected: an Arrow file that is not compressed"),
    ],
)
def test_a_table_that_is_not_read_says_what_is_there(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(str(tmp_path / name), 1000).documents())


def test_tables_that_lie_among_other_text_are_passed_over_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("a page")
    written("body", tmp_path / "a.csv")
    (tmp_path / "package.json").write_text('{\n "name": "no corpus"\n}')
    assert texts(tmp_path) == ["a page"]
    said = capsys.readouterr().err
    assert "note: 1 .json, 1 .csv files of " in said
    assert said.strip().endswith("are not read: name one of them, or its column with --text-field")
    (tmp_path / "package.json").unlink()
    assert texts(tmp_path, "body") == BODIES
    (tmp_path / "README.md").unlink()
    written("text", tmp_path / "a.csv")
    assert texts(tmp_path) == BODIES
    assert not capsys.readouterr().err


@pytest.mark.parametrize("corpus", ["python-stdlib", "a.md", "a.txt"])
def test_a_column_of_what_has_no_columns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.md", "a.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(CorpusError, match=r"--text-field body with .* / expected: a table"):
        texts(corpus, "body")


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"


def test_a_chat_has_the_tokens_that_its_template_gives_it_and_its_messages_are_text(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = tokenizer.__class__.from_pretrained(_saved(tokenizer, tmp_path), chat_template=TEMPLATE)
    encode = chat_encoder(tokenizer, "some model")
    chat = [{"role": "user", "content": "the state"}, {"role": "assistant", "content": "flows"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    ids = encode(chat)
    assert whole[: len(ids) + 1] == [*ids, 0]  # the last end of text is ours to add
    assert ids.count(0) == 1
    spelled = [{"role": "user", "content": "what is <|endoftext|>?"}]
    assert 0 not in encode(spelled)
    assert tokenizer.decode(encode(spelled)) == "<|user|>what is <|endoftext|>?"
    with pytest.raises(TeacherError, match=r"a chat that the template of some model refuses \(.*\)"):
        chat_encoder(_with(tokenizer, "{{ raise_exception('no') }}"), "some model")(chat)
    with pytest.raises(TeacherError, match=r"some model without a chat template / .* --text-field"):
        chat_encoder(_with(tokenizer, None), "some model")(chat)


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def _with(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


Row = Callable[[int, Any], dict[str, Any]]


@pytest.mark.parametrize(
    "row",
    [
        lambda seed, tokenizer: {"text": text_of(seed, 20)},
        lambda seed, tokenizer: {"input_ids": tokenizer(text_of(seed, 20))["input_ids"]},
        lambda seed, tokenizer: {"input_ids": [*tokenizer(text_of(seed, 20))["input_ids"], 0]},
        lambda seed, tokenizer: {"other": "x", "body": tokenizer(text_of(seed, 20))["input_ids"]},
        lambda seed, tokenizer: {"messages": [{"role": "user", "content": text_of(seed, 20)}]},
    ],
    ids=["text", "tokens", "closed tokens", "named tokens", "chat"],
)
def test_texts_tokens_and_chats_fill_a_store_with_one_end_of_text_for_each(
    teachers: dict[str, Path], tmp_path: Path, tokenizer: Any, row: Row
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in teachers["neox"].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    )
    rows = [row(seed, tokenizer) for seed in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    field = "body" if "body" in rows[0] else None
    options: dict[str, Any] = {"tokens_only": True, "tokens": 8 * CONTEXT, "validation_tokens": CONTEXT}
    options |= {"text_field": field} if field else {}
    store = Store.open(extracted(tmp_path, model, tmp_path / "a.jsonl", **options))
    assert store.identity.get("text_field") == field
    ids, document = (np.ravel(each) for each in (store.tokens("train"), store.document("train")))
    for number in np.unique(document)[:-1]:
        expected = [*tokenizer(text_of(int(number), 20))["input_ids"], 0]
        assert ids[document == number].tolist() == expected
    if field:
        with pytest.raises(LftpipeError, match="text_field"):
            extracted(tmp_path, model, tmp_path / "a.jsonl", **options | {"text_field": "other"})


def test_tokens_that_are_not_the_teachers_are_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.dumps({"input_ids": [400 + seed] * 40}) + "\n" for seed in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with pytest.raises(TeacherError, match=r"corpus with token \d+ beside .* / expected: tokens below 320"):
        extracted(tmp_path, teachers["neox"], tmp_path / "a.jsonl", tokens_only=True, tokens=8 * CONTEXT)
