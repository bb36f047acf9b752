"""A writer takes a folder only if its files say that it is a store, whatever their names are."""

import json
from pathlib import Path

import pytest
from fake_states import files, make_spec, write

from lftpipe.base.errors import StoreError
from lftpipe.base.files import write_sealed
from lftpipe.store import Store, StoreWriter, verify_store
from lftpipe.store.layout import JOURNAL, LOCK, MANIFEST
from lftpipe.store.records import line_of
from lftpipe.store.windows import PRODUCER, READERS


def a_run(path: Path) -> None:
    write_sealed(path / MANIFEST, {"block": [5, 8], "objective": "fw"})
    (path / "flow.safetensors").write_bytes(b"weights")


def a_web_page(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({"name": "page", "icons": []}))


def a_diary(path: Path) -> None:
    (path / JOURNAL).write_text('{"day": 1}\n')
    (path / "thesis.tex").write_text("years of work")


def a_log_of_ours_alone(path: Path) -> None:
    (path / JOURNAL).write_bytes(line_of({"something": "else"}))


def another_zarr(path: Path) -> None:
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    (path / "train").mkdir()


def a_name_alone(path: Path) -> None:
    (path / "train").mkdir()
    (path / "train" / "photo.jpg").write_bytes(b"holiday")


OTHERS = (a_run, a_web_page, a_diary, a_log_of_ours_alone, another_zarr, a_name_alone)


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": False}, {"repair": True}], ids=str)
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_a_folder_of_something_else_stays_as_it_is(tmp_path, other, options):
    path = tmp_path / "folder"
    path.mkdir()
    other(path)
    before = files(path)
    if "repair" in options:
        try:
            options = {"repair": verify_store(path)}
        except StoreError:
            options = {}
    with pytest.raises(StoreError, match=r"folder holds .* and no store / .* / do: [^-]*(itself|--store)?$"):
        StoreWriter.open(path, make_spec(), **options)
    assert files(path) == before
    assert not (path / LOCK).exists()


@pytest.mark.parametrize("other", [a_run, a_web_page], ids=lambda other: other.__name__)
@pytest.mark.parametrize("read", [Store.open, verify_store], ids=["open", "verify"])
def test_nobody_is_told_to_repair_something_else(tmp_path, read, other):
    other(tmp_path)
    with pytest.raises(StoreError, match=r"holds .* and no store / .* / do: name another --store"):
        read(tmp_path)


def test_a_file_that_is_the_users_is_not_deleted_with_a_store(tmp_path):
    path = tmp_path / "states.zarr"
    write(path, make_spec())
    (path / "notes.txt").write_text("read me")
    before = files(path)
    with pytest.raises(StoreError, match=r"a store with notes\.txt in it, which is not lftpipe's"):
        StoreWriter.open(path, make_spec(), force=True)
    assert files(path) == before
    (path / "notes.txt").unlink()
    with StoreWriter.open(path, make_spec(), force=True) as writer:
        assert len(writer.pending()) == 4


def test_a_rolling_store_is_replaced_with_what_it_knows_of_its_readers(tmp_path):
    path = tmp_path / "states.zarr"
    write(path, make_spec())
    (path / PRODUCER).touch()
    (path / READERS).mkdir()
    with StoreWriter.open(path, make_spec(), force=True) as writer:
        assert len(writer.pending()) == 4
    assert not (path / READERS).exists()


@pytest.mark.parametrize("broken", [MANIFEST, "zarr.json"])
def test_a_damaged_store_is_still_known_as_one(tmp_path, broken):
    path = tmp_path / "states.zarr"
    write(path, make_spec())
    (path / broken).write_bytes(b"{}")
    with StoreWriter.open(path, make_spec(), force=True) as writer:
        assert len(writer.pending()) == 4
