"""Shards are produced anywhere under names of their own; one writer takes them, each once."""

import os
import shutil
from pathlib import Path

import pytest
from fake_states import files, fill, make_spec, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.store import PartJournal, Sealed, ShardKey, StoreWriter, abandon, produce_shard, read_parts

SPEC = make_spec()


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path / "whole", SPEC)
    return files(tmp_path / "whole")


def begun(path: Path) -> StoreWriter:
    writer = StoreWriter.open(path, SPEC)
    for split in SPEC.sequences:
        writer.put_tokens(split, *tokens(SPEC, split))
    return writer


def produced(path: Path, key: ShardKey, attempt: str) -> Sealed:
    with produce_shard(path, SPEC, key, attempt) as shard:
        fill(shard, SPEC)
    assert shard.sealed is not None
    return Sealed.from_json(shard.sealed.to_json())  # it may come from another machine


def test_what_others_produce_in_any_order_makes_the_same_store(tmp_path, whole):
    with begun(tmp_path / "mine") as writer:
        sealed = [produced(writer.path, key, f"w{number}") for number, key in enumerate(writer.pending())]
        assert not list(writer.path.glob("*/hidden/c.*[0-9]"))  # nothing has its name yet
        assert writer.commit(*reversed(sealed)) == len(sealed)
        writer.finish()
    assert files(tmp_path / "mine") == whole


def test_a_second_attempt_changes_no_byte_and_leaves_nothing(tmp_path, whole):
    with begun(tmp_path / "mine") as writer:
        keys = writer.pending()
        first = [produced(writer.path, key, "first") for key in keys]
        late = [produced(writer.path, key, "late") for key in keys]
        assert writer.commit(*first) == len(keys)
        journal = (writer.path / "journal.jsonl").read_bytes()
        assert writer.commit(*late, *first) == 0  # a zombie's; and a message that comes twice
        assert (writer.path / "journal.jsonl").read_bytes() == journal
        assert not list(writer.path.rglob("*.partial"))
        writer.finish()
    assert files(tmp_path / "mine") == whole


def test_a_shard_whose_files_are_not_as_they_were_written_is_refused(tmp_path, whole):
    with begun(tmp_path / "mine") as writer:
        key, *others = writer.pending()
        broken = produced(writer.path, key, "broken")
        file = next(iter(broken.records))
        broken.partial(writer.path, file).write_bytes(b"")
        assert writer.commit(broken) == 0
        assert writer.pending() == [key, *others]
        writer.commit(*(produced(writer.path, each, "again") for each in (key, *others)))
        writer.finish()
    assert files(tmp_path / "mine") == whole


def test_an_unfinished_attempt_is_gone_when_the_store_is_opened_again(tmp_path, whole):
    with begun(tmp_path / "mine") as writer:
        produced(writer.path, writer.pending()[0], "e1-lost-1")
    (tmp_path / "mine/train/hidden/c.0.0.0.0.partial").write_bytes(b"of an older lftpipe")
    write(tmp_path / "mine", SPEC)
    assert files(tmp_path / "mine") == whole


def test_every_opening_to_compute_begins_an_epoch(tmp_path):
    with begun(tmp_path / "mine") as writer:
        for expected in (1, 2):
            writer.begin_epoch({"kind": "cpu"})
            assert writer.epoch == expected
    with StoreWriter.open(tmp_path / "mine", SPEC) as writer:
        writer.begin_epoch({"kind": "cpu"})
        assert writer.epoch == 3


def test_parts_survive_the_driver_and_are_taken_once_they_are_there(tmp_path, whole):
    path = tmp_path / "mine"
    with begun(path) as writer:
        keys = writer.pending()
    parts = [PartJournal(path, index, 2, "plan") for index in (1, 2)]
    for part in parts:
        with part.writing():
            for number, key in enumerate(keys[part.index - 1 :: 2]):
                part.append(produced(path, key, f"{part.attempts}-x-{number}"))
            part.note(compute_error={"part": part.index})
            part.finish()
    (path / "part-1-of-2.jsonl").write_bytes((path / "part-1-of-2.jsonl").read_bytes() + b"torn")
    assert read_parts(path, "another plan")[0].sealed == {}
    found = read_parts(path, "plan")
    assert [(part.index, part.count, part.done, part.notes) for part in found] == [
        (index, 2, True, {"compute_error": {"part": index}}) for index in (1, 2)
    ]
    with StoreWriter.open(path, SPEC) as writer:  # which would remove what nobody knows
        assert writer.pending() == keys
        writer.commit(*(sealed for part in found for sealed in part.sealed.values()))
        writer.finish()
    assert files(path) == whole


def test_a_part_that_was_killed_goes_on_and_removes_what_it_left(tmp_path):
    path = tmp_path / "mine"
    with begun(path) as writer:
        first, second, *_ = writer.pending()
    part = PartJournal(path, 1, 1, "plan")
    with part.writing():
        part.append(produced(path, first, f"{part.attempts}-x-1"))
        produced(path, second, f"{part.attempts}-x-2")  # killed before it was recorded
    again = PartJournal(path, 1, 1, "plan")
    with again.writing():
        assert list(again.sealed) == [first]
        assert again.sealed[first].is_there(path)
        assert {partial.name.split(".")[-2] for partial in path.rglob("*.partial")} == {"p1-1-x-1"}


def test_a_line_of_a_part_that_does_not_fit_on_the_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "mine"
    with begun(path):
        pass
    part, real = PartJournal(path, 1, 1, "plan"), os.write
    with part.writing():
        before = (path / "part-1-of-1.jsonl").read_bytes()
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
        with pytest.raises(StoreError, match="No space left"):
            part.note(compute_error={})
        monkeypatch.undo()
        assert (path / "part-1-of-1.jsonl").read_bytes() == before
        assert part.notes == {}


def test_a_store_begun_for_nothing_is_gone_but_never_a_finished_one(tmp_path):
    with begun(tmp_path / "mine"):
        pass
    abandon(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    write(tmp_path / "mine", SPEC)
    before = files(tmp_path / "mine")
    abandon(tmp_path / "mine")
    assert files(tmp_path / "mine") == before
    shutil.rmtree(tmp_path / "mine")
