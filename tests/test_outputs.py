"""What a command makes appears at once, and replaces nothing that lftpipe did not make."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from waiting import Child

from lftpipe.base.errors import RunError, SettingsError
from lftpipe.base.outputs import COMMENT, MARK, making, making_folder, refuse_foreign_files, refuse_name

MARKS = (b'"mine"', b'"ours"')


def make(record: Path, text: str = "new", *, force: bool = False) -> None:
    page, picture = record.with_suffix(".md"), record.with_suffix(".png")
    with making(record, [page, picture], marks=MARKS, force=force) as staging:
        staging.path(picture).write_bytes(MARK + text.encode())
        staging.path(page).write_text(f"{text} {COMMENT}")
        staging.path(record).write_text(f'{{"mine": "{text}"}}')


def make_folder(out: Path, text: str = "new") -> None:
    with making_folder(out) as folder:
        (folder / "deep").mkdir()
        (folder / "deep/file").write_text(text)
        (folder / "file").write_text(text)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too; empty folders as well."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items()}


def test_files_appear_together_in_a_new_folder_and_leave_nothing_else(tmp_path):
    make(tmp_path / "new" / "deep" / "a.json")
    assert sorted(content(tmp_path / "new" / "deep")) == ["a.json", "a.md", "a.png"]


def test_an_error_leaves_what_was_there(tmp_path):
    make(tmp_path / "a.json", "old")
    before = content(tmp_path)
    for record in (tmp_path / "a.json", tmp_path / "new" / "a.json"):
        with pytest.raises(OSError, match="full"), making(record, marks=MARKS, force=True) as staging:  # noqa: PT012
            staging.path(record).write_text("half")
            raise OSError(errno.ENOSPC, "full")
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["a.json", "a.md", "a.png"])
def test_a_file_of_someone_else_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("years of work")
    for force in (False, True):
        expected = "which exists" if name == "a.json" and not force else "which lftpipe did not make"
        with pytest.raises(SettingsError, match=rf"{name}, {expected}"):
            make(tmp_path / "a.json", force=force)
    assert content(tmp_path) == {name: b"years of work"}


def test_a_damaged_record_can_be_replaced(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"\x00ine": 1, "ours"')
    with pytest.raises(SettingsError, match=r"a\.json, which exists / .* / do: pass --force"):
        make(tmp_path / "a.json")
    make(tmp_path / "a.json", force=True)
    assert (tmp_path / "a.json").read_text() == '{"mine": "new"}'


def test_a_hidden_folder_of_someone_else_is_not_taken_for_ours(tmp_path):
    (tmp_path / ".a.json.making").mkdir()
    (tmp_path / ".a.json.making" / "thesis").write_text("years of work")
    with pytest.raises(SettingsError, match="which lftpipe did not make"):
        make(tmp_path / "a.json")
    assert content(tmp_path)[".a.json.making/thesis"] == b"years of work"


def test_there_is_one_writer(tmp_path):
    record = tmp_path / "a.json"
    with making(record, marks=MARKS, force=True) as staging:
        with pytest.raises(
            RunError, match=r"a\.json, which another process is making / expected: one writer"
        ):
            make(record)
        staging.path(record).write_text('{"mine": 1}')
    assert sorted(content(tmp_path)) == ["a.json"]


def test_a_result_that_was_made_meanwhile_is_not_replaced(tmp_path):
    record = tmp_path / "a.json"
    make(record, "first")
    with pytest.raises(SettingsError, match="which exists"):
        make(record)
    assert record.read_text() == '{"mine": "first"}'


def test_a_folder_is_replaced_whole(tmp_path):
    make_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("")
    make_folder(tmp_path / "out")
    assert sorted(content(tmp_path)) == ["out", "out/deep", "out/deep/file", "out/file"]
    with pytest.raises(RunError, match="deep, which is not part of an export"):
        refuse_foreign_files(tmp_path / "out", {"file"}, "an export")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\nb", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(SettingsError, match="a plain name"):
        refuse_name(name, "--run")


def killed_before(number: int, act: Callable[[], None]) -> bool:
    """Whether a process of its own that does this died before its disk operation of this number."""
    count = itertools.count(1)

    def watched(operation):
        def call(*arguments, **options):
            if next(count) == number:
                os._exit(9)
            return operation(*arguments, **options)

        return call

    def watched_act() -> None:
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, watched(getattr(os, name)))
        act()

    status = Child(watched_act).join()
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("what", ["files", "files again", "folder", "folder again"])
def test_killed_at_every_disk_operation_the_same_command_gives_what_an_unkilled_one_gives(
    tmp_path, monkeypatch, what
):
    again = what.endswith("again")

    def do() -> None:
        if what.startswith("files"):
            make(Path("a.json"), "new", force=again)
        else:
            make_folder(Path("out"))

    here, done, partly = tmp_path / "here", 0, set()
    for number in itertools.count(1):
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        monkeypatch.chdir(here)
        if again:
            make(Path("a.json"), "old") if what.startswith("files") else make_folder(Path("out"), "old")
        if not killed_before(number, do):
            done = number
            break
        partly.add(tuple(sorted(content(here))))
        with suppress(SettingsError):  # all of it has its name already
            do()
        if what.startswith("files"):
            want = {"a.json": b'{"mine": "new"}', "a.md": f"new {COMMENT}".encode(), "a.png": MARK + b"new"}
        else:
            want = {"out": b"", "out/file": b"new", "out/deep": b"", "out/deep/file": b"new"}
        found = content(here)
        leftover = {name for name in found if name.startswith(".")}
        assert {name: found[name] for name in found.keys() - leftover} == want
        if leftover:  # of a command that had ended but for its tidying: the next one removes it
            make(Path("a.json"), "new", force=True) if what.startswith("files") else do()
            assert content(here) == want
    assert done > 8
    assert len(partly) > 3
