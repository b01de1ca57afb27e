"""Reads from an offline run's ``.wandb`` file which steps are recorded.

The file is a LevelDB log of protobuf records (blocks of 32 KiB, 7-byte chunk headers: checksum, length, type) after a
header of 7 bytes. wandb writes it every 15 seconds, so after a kill only the file shows what was recorded.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4
_FINISH_SECONDS = 5.0


def recorded_steps(wandb_dir: Path, run_id: str) -> set[int]:
    """The steps in all offline sessions of ``run_id`` in ``wandb_dir``."""
    paths = wandb_dir.glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb")
    return {step for path in paths for step in _history_steps(path)}


def wait_until_finished(path: Path) -> bool:
    """Wait until wandb's service has written the last record of an offline run; ``run.finish`` does not wait for it.

    Returns:
        Whether it came; a run that is resumed before it would miss rows, and send them again.
    """
    deadline = time.monotonic() + _FINISH_SECONDS
    while not _is_finished(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_finished(path: Path) -> bool:
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record
    records = list(read_records(path, last_blocks=2)) if path.exists() else []
    return bool(records) and record_type.FromString(records[-1]).WhichOneof("record_type") == "exit"


def _history_steps(path: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record
    for content in read_records(path):
        record = record_type.FromString(content)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def read_records(path: Path, last_blocks: int | None = None) -> Iterator[bytes]:
    """Yield the complete records of a ``.wandb`` file, up to the first incomplete one.

    Args:
        last_blocks: read only so many blocks at the end, the first record of which may lack its beginning; None: all.
    """
    skipped = 0 if last_blocks is None else max(0, (path.stat().st_size - 1) // _BLOCK_BYTES + 1 - last_blocks)
    with path.open("rb") as file:
        file.seek(skipped * _BLOCK_BYTES)
        content = file.read()
    offset, record = 0 if skipped else _HEADER_BYTES, b""
    while offset + _CHUNK.size <= len(content):
        left_in_block = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left_in_block < _CHUNK.size:
            offset += left_in_block
            continue
        _, num_bytes, kind = _CHUNK.unpack_from(content, offset)
        start = offset + _CHUNK.size
        offset = start + num_bytes
        if kind == 0 or offset > len(content):
            return
        record = content[start:offset] if kind in (_FULL, _FIRST) else record + content[start:offset]
        if kind in (_FULL, _LAST):
            yield record
