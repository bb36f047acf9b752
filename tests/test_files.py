"""Fingerprints do not depend on the order of keys; files appear whole; every byte of a sealed file counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.base.files import (
    differences,
    file_digest,
    fingerprint,
    plain,
    read_sealed,
    write_atomic,
    write_sealed,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_the_order_of_keys_does_not_matter(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))
    assert plain(value) == value
    assert list(differences(value, plain(value))) == []


@given(VALUES, VALUES)
def test_values_have_equal_fingerprints_only_if_they_are_equal(one, other):
    if one != other:
        assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "not JSON compliant"),
        (np.float32(1), TypeError, "not JSON serializable"),
        ({1, 2}, TypeError, "not JSON serializable"),
    ],
)
def test_only_plain_values_have_fingerprints(value, error, message):
    with pytest.raises(error, match=message):
        fingerprint({"key": [value]})


def test_tuples_count_as_lists():
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": [1, 2]})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomic(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk is gone")))
        with pytest.raises(OSError, match="disk is gone"):
            write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"


def test_every_flipped_or_missing_byte_of_a_sealed_file_is_found(tmp_path):
    file = tmp_path / "sealed.json"
    value = {"list": [1, 2.5, None], "text": "ü €", "nested": {"true": True}}
    write_sealed(file, value)
    assert read_sealed(file) == value
    whole = file.read_bytes()
    for place in range(len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="its digest does not match"):
                read_sealed(file)


def test_file_digests_are_those_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    (tmp_path / "b").write_bytes(b"a" * 2_999_999 + b"b")
    (tmp_path / "c").write_bytes(b"a" * 3_000_000)
    one, two, three = (file_digest(tmp_path / name) for name in "abc")
    assert one == three != two
    assert len(one) == 32


def test_every_difference_is_named():
    old = {"teacher": {"name": "a", "revision": 1}, "seed": 0}
    new = {"teacher": {"name": "b", "revision": 1}, "context": 5, "seed": 0}
    assert list(differences(old, new)) == ["context: None -> 5", "teacher.name: 'a' -> 'b'"]
