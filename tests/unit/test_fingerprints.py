"""Fingerprints that manifests and logs hold: their values are a contract."""

import hashlib

import pytest

from rlinf_lite import fingerprints


def test_of_text():
    assert fingerprints.of_text("ä") == hashlib.sha256("ä".encode()).hexdigest()


def test_of_a_value_whatever_the_order_of_its_keys():
    expected = hashlib.sha256(b'{"a": [1, 2.5], "b": null}').hexdigest()
    assert fingerprints.of_value({"b": None, "a": (1, 2.5)}) == expected
    assert fingerprints.of_value({"a": [1, 2.5], "b": None}) == expected


def test_of_what_is_no_json_value():
    with pytest.raises(TypeError):
        fingerprints.of_value({"a": object})
    assert fingerprints.of_value({"a": object}, default=str) == fingerprints.of_value({"a": "<class 'object'>"})


def test_of_a_file(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert fingerprints.of_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
