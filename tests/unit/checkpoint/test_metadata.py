"""Reading ``.metadata``: the quick ways agree with the general ones."""

from __future__ import annotations

import io
import pickle
import random
import sys
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.formats import dcp_metadata
from rlinf_lite.checkpoint.formats.dcp_writer import ShardPlanner
from rlinf_lite.checkpoint.formats.unpickling import UNREADABLE, SafeUnpickler
from rlinf_lite.checkpoint.live import HostBuffer, StillTensors
from rlinf_lite.checkpoint.memory.files import MemoryWriter
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.sections import Section


class Unpickler(SafeUnpickler):
    def named(self, module: str, name: str) -> Any:
        return OrderedDict if name == "OrderedDict" else None


VALUES: list[Any] = [
    {"one": (1, -2, 1 << 40), "two": [None, True, 0.5], "text": "ä" * 300},
    [("row", index, "x" * 40) for index in range(5000)],  # several frames
    [b"bytes" * 40_000, "a text beyond a frame" * 10_000],
    OrderedDict([("b", 1), ("a", {3, 4})]),
]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=["small", "frames", "large", "named"])
def test_what_is_read_is_what_was_written(value, protocol):
    value = [value] if protocol >= 4 else [repr(value)]  # sets need a name in older protocols
    content = pickle.dumps(value, protocol)
    assert Unpickler(content).load() == value == pickle._Unpickler(io.BytesIO(content)).load()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", VALUES[:1] + VALUES[3:])
def test_a_pickle_that_ends_early_is_an_error(value):
    content = pickle.dumps(value, 4)
    for end in range(len(content)):
        with pytest.raises(UNREADABLE):
            Unpickler(content[:end]).load()


def test_chunks_behind_each_other_are_checked_as_boxes_of_any_form_are():
    chance, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(3000):
        size = chance.randint(1, 4)
        whole = chunk((0, 0), (size, 3))
        chunks = []
        for _ in range(chance.randint(0, 4)):
            start = chance.randint(0, size)
            chunks.append(chunk((start, 0), (chance.randint(0, size - start), 3)))
        covered = dcp_metadata._is_covered(whole, chunks)
        assert covered == (not any(dcp_metadata._corners(whole, chunks, [0]))), (whole, chunks)
        seen[covered] += 1
    assert min(seen.values()) > 100


def test_what_is_written_does_not_depend_on_which_names_are_one_object():
    # A pickle of a tensor's type names the module torch, too.
    assert metadata_of(sys.intern("torch")) == metadata_of("".join(["tor", "ch"]))


def metadata_of(name: str) -> bytes | None:
    ranks = Ranks()
    part = ShardPlanner(ranks, Section.agree(ranks, layout.ACTOR)).plan(lambda: {"a": {name: torch.arange(4.0)}})
    create = contextmanager(lambda _, size: iter([MemoryWriter(size)]))
    return part.metadata([part.write(create, StillTensors(part.tensor, HostBuffer())).results])


def chunk(offsets: tuple[int, int], sizes: tuple[int, int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
