"""A store that was left unfinished, or is there already: gone on with, kept, done again, replaced."""

from pathlib import Path

import pytest
from fake_states import files, fill, make_spec, tokens, write

from lftpipe.base.errors import StoreError
from lftpipe.store import Store, StoreWriter


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "states.zarr"


def write_some(path: Path, spec, shards: int) -> None:
    with StoreWriter.open(path, spec) as writer:
        for split in spec.sequences:
            writer.put_tokens(split, *tokens(spec, split))
        for key in writer.pending()[:shards]:
            with writer.shard(key) as shard:
                fill(shard, spec)


def test_an_incomplete_store_is_refused_by_readers_and_resumed_by_writers(path, tmp_path):
    spec = make_spec()
    write_some(path, spec, 2)
    with pytest.raises(StoreError, match=r"store holds 2 of 4 shards .* run `lftpipe extract --resume`"):
        Store.open(path)
    written = write(path, spec)
    assert [(key.split, key.index, key.sequences) for key in written] == [
        ("train", 2, range(8, 10)),
        ("validation", 0, range(3)),
    ]
    write(tmp_path / "unbroken", spec)
    assert files(path) == files(tmp_path / "unbroken")


def test_a_complete_store_has_nothing_pending(path):
    write(path, make_spec())
    before = files(path)
    with StoreWriter.open(path, make_spec()) as writer:
        assert writer.complete
        assert writer.pending() == []
    assert write(path, make_spec()) == []
    assert files(path) == before


def test_another_identity_is_never_mixed_in(path):
    write_some(path, make_spec(), 1)
    changed = make_spec(
        identity={"teacher": {"name": "fake", "revision": "b2"}, "seed": 1}, width=41, layers=(0, 2)
    )
    with pytest.raises(
        StoreError,
        match=r"identity.seed: 0 -> 1; identity.teacher.revision: 'a1' -> 'b2'; layers: .*; width: 40 -> 41",
    ):
        StoreWriter.open(path, changed)
    write(path, make_spec())
    with pytest.raises(StoreError, match=r"identity\.seed: 0 -> 1"):
        StoreWriter.open(path, changed)
    write(path, make_spec(details={"lftpipe": "1.0"}))  # details may change


def test_other_tokens_are_never_mixed_in(path):
    spec = make_spec()
    write_some(path, spec, 1)
    ids, document = tokens(spec, "train")
    ids[9, 5] += 1
    with (
        StoreWriter.open(path, spec) as writer,
        pytest.raises(StoreError, match="tokens of train sequence 9 are not the stored ones"),
    ):
        writer.put_tokens("train", ids, document)


def test_a_store_never_shrinks(path):
    write(path, make_spec())
    with pytest.raises(StoreError, match="8 train sequences, of a store of 10"):
        StoreWriter.open(path, make_spec(sequences={"train": 8, "validation": 3}))


def test_without_resume_an_existing_store_is_refused_and_force_replaces_it(path, tmp_path):
    write(path, make_spec())
    other = make_spec(identity={"teacher": "another"})
    with pytest.raises(StoreError, match=r"exists .*\(--resume\) or start over \(--force"):
        StoreWriter.open(path, other, resume=False)
    write(path, other, force=True)
    write(tmp_path / "fresh", other)
    assert files(path) == files(tmp_path / "fresh")


def test_shards_that_rot_before_the_store_is_complete_are_written_again(path, tmp_path):
    spec = make_spec()
    write_some(path, spec, 3)
    rotten = path / "train/hidden/c.0.1.0.0"
    data = bytearray(rotten.read_bytes())
    data[100] ^= 4
    rotten.write_bytes(data)
    (path / "train/attention/c.0.0.0.0").unlink()
    with pytest.raises(
        StoreError, match=r"train/hidden/c.0.1.0.0 changed since .* only these are written again"
    ):
        write(path, spec)
    assert [key.index for key in write(path, spec)] == [1]
    write(tmp_path / "unbroken", spec)
    assert files(path) == files(tmp_path / "unbroken")


def test_a_damaged_journal_line_is_work_not_done(path, tmp_path):
    spec = make_spec()
    write_some(path, spec, 3)
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[-2] = lines[-2].replace(b"hidden", b"hodden")
    lines[-1] = lines[-1][:30]  # torn
    journal.write_bytes(b"".join(lines))
    assert [(key.split, key.index) for key in write(path, spec)] == [
        ("train", 1),
        ("train", 2),
        ("validation", 0),
    ]
    write(tmp_path / "unbroken", spec)
    assert files(path) == files(tmp_path / "unbroken")


def test_a_damaged_plan_is_refused(path):
    write_some(path, make_spec(), 1)
    journal = path / "journal.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes())
    with pytest.raises(StoreError, match=r"journal\.jsonl is damaged"):
        StoreWriter.open(path, make_spec())
    with pytest.raises(StoreError, match=r"journal\.jsonl is damaged"):
        Store.open(path)
    write(path, make_spec(), force=True)
