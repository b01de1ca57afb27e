"""Files that know their size and hash, and errors of the disk that keep their name."""

import errno
import hashlib
import os
from array import array

import pytest
import torch

from rlinf_lite.checkpoint.files import HashingFileSystem, hashed, write_durably
from rlinf_lite.checkpoint.manifest import hash_file


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_a_file_knows_what_was_written(tmp_path):
    with hashed(tmp_path / "x") as file:
        file.write(b"abc")
        file.write(memoryview(array("i", [1, 2, 3])))
        assert file.tell() == 15
    assert file.record() == hash_file(tmp_path / "x")


def test_torch_writes_through_it(tmp_path):
    with hashed(tmp_path / "x") as file:
        torch.save(torch.arange(100_000), file)
    assert file.record() == hash_file(tmp_path / "x")
    assert torch.equal(torch.load(tmp_path / "x", weights_only=True), torch.arange(100_000))


def test_write_durably(tmp_path):
    record = write_durably(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    assert record.size == 7
    assert record.sha256 == hashlib.sha256(b"content").hexdigest()


def test_the_record_follows_a_rename(tmp_path):
    files = HashingFileSystem(lambda path: None)
    with files.create_stream(tmp_path / "x.tmp", "wb") as stream:
        stream.write(b"abc")
    files.rename(tmp_path / "x.tmp", tmp_path / "x")
    assert files.records == {tmp_path / "x": hash_file(tmp_path / "x")}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("num_bytes", [1, 10**6])
def test_a_full_device_is_named_and_the_file_closed(tmp_path, num_bytes):
    (tmp_path / "x").symlink_to("/dev/full")
    before = open_files()
    with pytest.raises(OSError) as caught:
        write_durably(tmp_path / "x", bytes(num_bytes))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "x")
    assert open_files() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_that_torch_makes_another_one_of_comes_out_as_itself(tmp_path):
    (tmp_path / "x").symlink_to("/dev/full")
    files, before = HashingFileSystem(lambda path: None), open_files()
    with (
        pytest.raises(OSError, match="No space left on device"),
        files.create_stream(tmp_path / "x", "wb") as stream,
    ):
        torch.save(torch.ones(10**6), stream)
    assert files.records == {}
    assert open_files() == before


def test_an_error_of_the_caller_closes_the_file_and_records_nothing(tmp_path):
    files, before = HashingFileSystem(lambda path: None), open_files()
    with pytest.raises(KeyError), files.create_stream(tmp_path / "x", "wb") as stream:
        stream.write(b"half")
        raise KeyError
    assert files.records == {}
    assert open_files() == before
