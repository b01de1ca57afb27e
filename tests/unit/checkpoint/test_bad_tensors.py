"""Tensors and data in forms that torch.save can write but no checkpoint has: refused before memory is allocated."""

import io
import pickle
import resource
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlinf_lite.checkpoint import DamagedCheckpoint, read_data
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.read_state import read_tensors


def saved_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Calls:
    """An object that is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_over(storage, size, stride, offset=0):
    """What torch saves of a tensor, with any geometry over the bytes of ``storage``."""
    typed = torch.storage.TypedStorage(wrap_storage=storage.untyped_storage(), dtype=storage.dtype, _internal=True)
    return Calls(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, OrderedDict())


def compressed(archive):
    """The same archive with its records compressed: torch reads it, and inflates it."""
    source, target = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    return target.getvalue()


def legacy(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def quantized():
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)


SPARSE = torch.eye(16, 8).to_sparse()
HUGE = 2**40
BAD_ENTRIES = {
    "compressed records": (compressed(saved_by_torch(torch.zeros(10**6))), "compressed"),
    "more elements than bytes": (saved_by_torch(tensor_over(torch.ones(4), (16, 8), (8, 1))), "over 4 stored"),
    "repeated elements": (saved_by_torch(tensor_over(torch.ones(1), (16, 8), (0, 0))), "over 1 stored"),
    "an offset behind the end": (saved_by_torch(tensor_over(torch.ones(128), (16, 8), (8, 1), 1)), "over 128 stored"),
    "a negative offset": (saved_by_torch(tensor_over(torch.ones(128), (16, 8), (8, 1), -1)), "not a plain tensor"),
    "negative strides": (saved_by_torch(tensor_over(torch.ones(128), (16, 8), (-8, 1), 127)), "not a plain tensor"),
    "a negative size": (saved_by_torch(tensor_over(torch.ones(128), (-16, -8), (8, 1))), "not a plain tensor"),
    "a sparse tensor": (saved_by_torch(SPARSE), "sparse"),
    "a quantized tensor": (saved_by_torch(quantized()), "qtensor"),
    "the old format": (legacy(torch.ones(16, 8)), "not a zip file"),
    "TorchScript": (torchscript(), "(TorchScript|compressed)"),
    "an empty entry": (b"", "an entry of 0 bytes"),
    "a list": (saved_by_torch([1, 2]), "holds a list where a tensor"),
    "another type": (saved_by_torch(torch.ones(16, 8).double()), r"is stored as torch\.float64"),
    "another shape": (saved_by_torch(torch.ones(17, 8)), r"is stored as torch\.float32 \[17, 8\]"),
}


@pytest.fixture
def plant_entry(path, plant):
    """Replace the bytes of one tensor of the checkpoint."""

    def put(content, name="model.layer.weight"):
        metadata = read_metadata(path / "actor")
        shard = (path / "actor" / "__0_0.distcp").read_bytes()
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                info.offset, info.length = len(shard), len(content)
        plant("actor/__0_0.distcp", shard + content)
        plant("actor/.metadata", pickle.dumps(metadata))

    return put


@pytest.fixture
def bounded_memory():
    """Let the process allocate two more gigabytes at most."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_an_entry_that_is_not_a_plain_tensor_is_refused(path, plant_entry, load, bounded_memory, what):
    content, reason = BAD_ENTRIES[what]
    plant_entry(content)
    for read in (load, lambda: read_tensors(path / "actor")):
        with pytest.raises(DamagedCheckpoint, match=rf"(__0_0\.distcp|\.metadata): .*{reason}") as caught:
            read()
        assert "MemoryError" not in str(caught.value), "refused before memory was asked for"


BAD_DATA = {
    "more elements than bytes": (tensor_over(torch.ones(1), (HUGE,), (0,)), "over 1 stored"),
    "a sparse tensor": (SPARSE, "sparse"),
    "a parameter": (torch.nn.Parameter(torch.ones(1)), "parameter"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_data_with_something_other_than_plain_values_and_tensors_is_refused(path, plant, bounded_memory, what):
    value, reason = BAD_DATA[what]
    plant("data/data.pt", saved_by_torch({"x": value}))
    with pytest.raises(DamagedCheckpoint, match=rf"data\.pt: .*{reason}") as caught:
        read_data(path)
    assert "MemoryError" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [compressed(saved_by_torch({"x": bytes(10**7)})), legacy({}), torchscript(), b""],
    ids=["compressed", "legacy", "torchscript", "empty"],  # content holds times, and ids must not
)
def test_other_formats_of_data_are_refused(path, plant, content):
    plant("data/data.pt", content)
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt: .*(compressed|not a zip file|TorchScript)"):
        read_data(path)


def change(path, plant, act):
    """Plant the checkpoint's metadata as ``act`` leaves it."""
    metadata = read_metadata(path / "actor")
    infos = {index.fqn: info for index, info in metadata.storage_data.items()}
    act(metadata.state_dict_metadata["model.layer.weight"], infos["model.layer.weight"])
    plant("actor/.metadata", pickle.dumps(metadata))


def chunk(offsets, sizes):
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


BAD_CHUNKS = {
    "none": [],
    "twice": [chunk([0, 0], [16, 8])] * 2,
    "a gap": [chunk([0, 0], [8, 8]), chunk([9, 0], [7, 8])],
    "an overlap that makes up for a gap": [chunk([0, 0], [8, 8]), chunk([4, 0], [8, 8])],
    "outside": [chunk([0, 0], [8, 8]), chunk([16, 0], [8, 8])],
    "a negative offset": [chunk([-8, 0], [16, 8])],
    "a negative size": [chunk([0, 0], [-16, -8])],
    "another rank": [chunk([0], [128])],
    "crossed": [chunk([0, 0], [8, 4]), chunk([8, 4], [8, 4]), chunk([0, 0], [8, 4]), chunk([8, 4], [8, 4])],
}


@pytest.mark.parametrize("what", BAD_CHUNKS)
def test_chunks_that_do_not_fill_their_tensor_once_are_refused(path, plant, load, what):
    def act(entry, info):
        entry.chunks = BAD_CHUNKS[what]

    change(path, plant, act)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: .*model\.layer\.weight (is not covered|has a chunk)"):
        load()


def test_chunks_in_two_dimensions_are_read(tmp_path):
    """The check of chunks accepts a valid split."""
    quarters = [chunk([0, 0], [1, 2]), chunk([0, 2], [1, 1]), chunk([1, 0], [3, 2]), chunk([1, 2], [3, 1])]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([4, 3]), quarters)
    whole, content, infos = torch.arange(12.0).view(4, 3), b"", {}
    for part in quarters:
        (row, column), (rows, columns) = part.offsets, part.sizes
        piece = saved_by_torch(whole[row : row + rows, column : column + columns].clone())
        infos[MetadataIndex("w", part.offsets)] = _StorageInfo("__0_0.distcp", len(content), len(piece))
        content += piece
    (tmp_path / "__0_0.distcp").write_bytes(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, infos)))
    assert torch.equal(read_tensors(tmp_path)["w"], whole)


BAD_SPANS = {
    "an absurd length": ({"length": HUGE}, "ends before byte"),
    "a length within the file that is not the tensor's": (
        {"length": 700},
        "not a zip file",
    ),
    "an absurd offset": ({"offset": HUGE}, "ends before byte"),
    "a negative offset": ({"offset": -1}, "at -1"),
    "a negative length": ({"length": -1}, "of -1 bytes"),
    "a fraction": ({"length": 1.5}, "is not a number"),
    "a truth": ({"offset": True}, "is not a number"),
    "the directory": ({"relative_path": "."}, "outside of its directory"),
    "its parent": ({"relative_path": ".."}, "outside of its directory"),
    "nothing": ({"relative_path": ""}, "outside of its directory"),
    "a NUL": ({"relative_path": "a\0b"}, "outside of its directory"),
    "another one's missing file": ({"relative_path": "__7_0.distcp"}, "is missing"),
    "the metadata": ({"relative_path": ".metadata"}, "ends before|cannot be read"),
}


@pytest.mark.parametrize("what", BAD_SPANS)
def test_a_place_where_no_tensor_is_is_refused(path, plant, load, bounded_memory, what):
    changes, reason = BAD_SPANS[what]

    def act(entry, info):
        for name, value in changes.items():
            setattr(info, name, value)

    change(path, plant, act)
    for read in (load, lambda: read_tensors(path / "actor")):
        with pytest.raises(DamagedCheckpoint, match=reason) as caught:
            read()
        assert "MemoryError" not in str(caught.value)
