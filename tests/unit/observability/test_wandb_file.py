"""The end of a ``.wandb`` file is read without the rest of it."""

from __future__ import annotations

import struct

import pytest

from rlinf_lite.observability.wandb_file import read_records

BLOCK = 32 * 1024


def leveldb_log(records):
    """The records as wandb writes them: chunks of 7 bytes and content that do not cross blocks of 32 KiB."""
    content = bytearray(7)
    for record in records:
        left, first = record, True
        while left or first:
            room = BLOCK - len(content) % BLOCK
            if room < 7:
                content += bytes(room)
                room = BLOCK
            part, left = left[: room - 7], left[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not left]
            content += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    return bytes(content)


@pytest.mark.parametrize("last", [b"exit", b"e" * 20_000])
@pytest.mark.parametrize("num_bytes", [100, 32_700, 65_520, 65_522, 65_530, 200_000])
def test_the_last_record_is_found_from_the_last_blocks(tmp_path, num_bytes, last):
    path = tmp_path / "run.wandb"
    records = [b"a" * 10, b"b" * num_bytes, b"c" * 3, last]
    path.write_bytes(leveldb_log(records))
    assert list(read_records(path)) == records
    assert list(read_records(path, last_blocks=2))[-1] == last
