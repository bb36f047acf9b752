"""Far more tokens asked for than the corpus has: the disk is asked for what the text gives, not for more."""

import shutil
from collections import namedtuple

import pytest
from conftest import CONTEXT, extracted, text_of

from lftpipe.base.errors import StoreError
from lftpipe.store import Store

Usage = namedtuple("Usage", "total used free")


def test_a_small_corpus_never_asks_for_a_large_disk(teachers, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for seed in range(20):
        (tmp_path / "text" / f"{seed}.md").write_text(text_of(seed, 60))
    free = 2 * 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    path = extracted(tmp_path, teachers["neox"], tmp_path / "text", tokens=10**12, validation_tokens=CONTEXT)
    assert 0 < Store.open(path).num_sequences("train") < 200
    free = 2**10
    with pytest.raises(StoreError, match=r"a store of .* with .* free at .* expected: room"):
        extracted(tmp_path / "other", teachers["neox"], tmp_path / "text", tokens=10**12)
