"""Files that are hashed while they are written, and storage errors that name their path."""

import errno
import os
import random
import tempfile
import threading
from array import array
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from rlinf_lite.checkpoint.files import BUFFER_BYTES, hashed, write_durably
from rlinf_lite.checkpoint.manifest import hash_file
from rlinf_lite.checkpoint.storage import storage_path


def is_open(path):
    """Whether this process holds the file open. Others' descriptors come and go: a collected object closes its own."""
    return os.path.realpath(path) in {
        os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
    }


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
    assert record.digest == blake3(b"content").hexdigest()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("num_bytes", [1, 10**6])
def test_a_full_device_is_named_and_the_file_closed(tmp_path, num_bytes):
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_durably(tmp_path / "x", bytes(num_bytes))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "x")
    assert not is_open(tmp_path / "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_that_torch_makes_another_one_of_comes_out_as_itself(tmp_path):
    (tmp_path / "x").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="No space left on device"),
        hashed(tmp_path / "x") as stream,
    ):
        assert is_open(tmp_path / "x")
        torch.save(torch.ones(10**7), stream)
    assert not is_open(tmp_path / "x")


def test_an_error_of_the_caller_closes_the_file(tmp_path):
    with pytest.raises(KeyError), hashed(tmp_path / "x") as stream:
        stream.write(b"half")
        assert is_open(tmp_path / "x")
        raise KeyError
    assert not is_open(tmp_path / "x")


SIZES = [0, 1, 4095, 4096, 4097, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 5 * BUFFER_BYTES + 12345]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("url", ["{}", "local://{}", "memory://{}"])
def test_any_size_comes_back_as_it_was_written(tmp_path, size, url):
    path = storage_path(url.format(tmp_path)) / "x"
    data = random.Random(size).randbytes(size)
    with hashed(path) as file:
        for first in range(0, size, 3_000_001):
            file.write(data[first : first + 3_000_001])
    assert path.read_bytes() == data
    assert file.record() == hash_file(path)
    assert file.record().digest == blake3(data).hexdigest()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a memory file system")
def test_a_file_system_in_memory():
    """It may refuse to be written past the page cache."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        record = write_durably(Path(directory, "x"), bytes(10**7 + 1))
        assert record == hash_file(Path(directory, "x"))


def test_threads_end_with_their_files(tmp_path):
    before = threading.active_count()
    for index in range(5):
        with hashed(tmp_path / f"x{index}") as file:
            file.write(bytes(3 * BUFFER_BYTES))
    assert threading.active_count() == before
