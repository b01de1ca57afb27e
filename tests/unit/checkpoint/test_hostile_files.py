"""Hostile files whose manifest agrees with them: refused with a clear error, and nothing in them runs."""

import io
import os
import pickle
import random
import resource
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, read_data, select
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.read_state import read_tensors


class MakesDirectory:
    """Unpickling it creates a directory."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def path(save):
    return save(5)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def plant(path, rewrite_manifest):
    """Replace a file of the checkpoint, and let the manifest agree."""

    def put(name, content):
        (path / name).write_bytes(content)
        files = manifests.read(path).files
        rewrite_manifest(path, files={**files, name: manifests.hash_file(path / name)})
        manifests.read_verified(path, "full")

    return put


@pytest.fixture
def load(root, path, make_state):
    return lambda: Checkpointer(root, seed=7).load(path, make_state(6))


def saved_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_hostile_pickle_works(marker):
    pickle.loads(pickle.dumps(MakesDirectory(marker)))
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_metadata_is_refused(plant, load, marker, protocol):
    plant("actor/.metadata", pickle.dumps(MakesDirectory(marker), protocol))
    with pytest.raises(UnsafeCheckpoint, match=r"\.metadata: asks for posix\.mkdir.*was not run"):
        load()
    assert not marker.exists()


def test_a_hostile_object_inside_of_good_metadata_is_refused(path, plant, load, marker):
    metadata = read_metadata(path / "actor")
    metadata.planner_data = {"model.empty": MakesDirectory(marker)}
    plant("actor/.metadata", pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpoint, match=r"posix\.mkdir"):
        load()
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr\n(ctorch\nSize\nV__class__\ntR", "os system", "torch load"]
)
def test_other_ways_to_call_something_are_refused(plant, load, name):
    plant("actor/.metadata", f"c{name.replace(' ', chr(10))}\n.".encode())
    with pytest.raises(UnsafeCheckpoint, match=name.split("\n")[0].replace(" ", r"\.")):
        load()


class AsPython311:
    """A member of an enum as Python 3.11.0 to 3.11.3 pickle it."""

    def __reduce__(self):
        return getattr, (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")


def test_members_of_an_enum_from_another_python_are_read(path, plant, load):
    metadata = read_metadata(path / "actor")
    metadata.planner_data = {"model.empty": AsPython311()}
    content = pickle.dumps(metadata)
    assert b"getattr" in content
    plant("actor/.metadata", content)
    load()


def test_a_dotted_name_does_not_reach_behind_the_list(plant, load):
    stream = pickle.PROTO + b"\x04" + b"\x8c\x05torch" + b"\x8c\x10Size.__class__._" + pickle.STACK_GLOBAL + b"."
    plant("actor/.metadata", stream)
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.Size\.__class__"):
        load()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="there dcp itself writes such metadata")
def test_metadata_that_dcp_wrote_under_python_3_13_is_read(tmp_path):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    stream = (tmp_path / ".metadata").read_bytes()
    old, new = b"\x8c\x07pathlib", b"\x8c\x0epathlib._local"
    assert stream.count(old) == 1
    frame = int.from_bytes(stream[3:11], "little") + len(new) - len(old)
    (tmp_path / ".metadata").write_bytes(stream[:3] + frame.to_bytes(8, "little") + stream[11:].replace(old, new))
    assert torch.equal(read_tensors(tmp_path)["w"], torch.ones(3))


@pytest.mark.parametrize(
    "value",
    [None, {}, "text", [1], torch.Size([1]), dcp.metadata.Metadata({}), dcp.metadata.Metadata({"a": 5}, {}, {})],
)
def test_a_pickle_of_something_else_is_no_metadata(plant, load, value):
    plant("actor/.metadata", pickle.dumps(value))
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: cannot be read"):
        load()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/__0_0.distcp"])
def test_metadata_that_names_a_file_elsewhere_is_refused(path, plant, load, name):
    metadata = read_metadata(path / "actor")
    next(iter(metadata.storage_data.values())).relative_path = name
    plant("actor/.metadata", pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpoint, match="outside of its directory"):
        load()


def test_a_linked_shard_is_refused_without_a_manifest(path, tmp_path):
    shard = path / "actor" / "__0_0.distcp"
    outside = shard.rename(tmp_path / "outside")
    shard.symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match="outside of its directory"):
        read_tensors(path / "actor")


def test_absurd_sizes_take_no_memory(path, plant):
    metadata = read_metadata(path / "actor")
    entry = metadata.state_dict_metadata["model.layer.weight"]
    entry.size = torch.Size([2**31, 2**31])
    entry.chunks[0].sizes = entry.size
    plant("actor/.metadata", pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match="names tensors of"):
        read_tensors(path / "actor")


def test_a_tensor_that_its_chunks_do_not_fill_is_refused(path, plant, load):
    """The rest of it would be whatever was in memory."""
    metadata = read_metadata(path / "actor")
    metadata.state_dict_metadata["model.layer.weight"].chunks[0].sizes = torch.Size([15, 8])
    plant("actor/.metadata", pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=r"model\.layer\.weight is not covered"):
        load()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_object_where_a_tensor_was_asked_for_is_never_unpickled(plant, path, load, marker, make_state, tmp_path):
    """What stock `dcp.load` would unpickle: an entry of bytes."""
    state = make_state(5)
    state["model"]["layer.weight"] = MakesDirectory(marker)
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    for name in ("__0_0.distcp", ".metadata"):
        plant(f"actor/{name}", (tmp_path / "stock" / name).read_bytes())
    with pytest.raises(UnsafeCheckpoint, match=r"model\.layer\.weight is a pickled object"):
        load()
    assert "model.layer.weight" not in read_tensors(path / "actor")
    assert not marker.exists()


def test_a_hostile_pickle_in_place_of_a_tensors_bytes_is_refused(path, plant, load, marker):
    metadata = read_metadata(path / "actor")
    hostile = saved_by_torch(MakesDirectory(marker))
    shard = (path / "actor" / "__0_0.distcp").read_bytes()
    for index, info in metadata.storage_data.items():
        if index.fqn == "model.layer.weight":
            info.offset, info.length = len(shard), len(hostile)
    plant("actor/__0_0.distcp", shard + hostile)
    plant("actor/.metadata", pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpoint, match=r"__0_0\.distcp: asks for posix\.mkdir"):
        load()
    with pytest.raises(UnsafeCheckpoint, match=r"posix\.mkdir"):
        read_tensors(path / "actor")
    assert not marker.exists()


def test_hostile_data_is_refused(path, plant, marker):
    plant("data/data.pt", saved_by_torch({"progress": MakesDirectory(marker)}))
    with pytest.raises(UnsafeCheckpoint, match=r"data\.pt: asks for posix\.mkdir.*was not run") as caught:
        read_data(path)
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_data_that_is_a_bare_pickle_is_refused(path, plant, marker):
    plant("data/data.pt", pickle.dumps(MakesDirectory(marker)))
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt"):
        read_data(path)
    assert not marker.exists()


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text", None], ids=str)
def test_data_that_is_no_dict_is_refused(path, plant, value):
    plant("data/data.pt", saved_by_torch(value))
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt: holds a "):
        read_data(path)


def test_missing_data_is_reported_as_missing(path):
    (path / "data" / "data.pt").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt: is missing"):
        read_data(path)


def test_missing_metadata_is_reported_as_missing(path):
    with pytest.raises(DamagedCheckpoint, match="is not a DCP directory"):
        read_metadata(path / "data")
    with pytest.raises(DamagedCheckpoint, match="is not a DCP directory"):
        read_metadata(path / "manifest.json")


def mutations(content, seed, count):
    chance = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 8])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        yield bytes(changed[: chance.choice([len(changed), chance.randrange(len(changed))])])


@pytest.mark.parametrize("name, read", [("actor/.metadata", read_tensors), ("data/data.pt", read_data)])
def test_damaged_bytes_that_nobody_verified_raise_nothing_else(path, name, read):
    """Readers are safe without a manifest: they return a value or raise an error of this package."""
    file = path / name
    where, refused = (path / "actor", 0) if name.startswith("actor") else (path, 0)
    for changed in mutations(file.read_bytes(), name, 400):
        file.write_bytes(changed)
        try:
            read(where)
        except DamagedCheckpoint as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 200


def test_a_truncated_shard_with_a_matching_manifest_is_refused(path, plant, load):
    shard = path / "actor" / "__0_0.distcp"
    plant("actor/__0_0.distcp", shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: cannot be read \(EOFError: ends before"):
        load()


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


def test_a_pickle_cannot_change_classes(plant, load):
    """A pickle may set attributes of instances, but of no class, which would outlive the read."""
    name = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    plant("actor/.metadata", name + b"N}X\x05\x00\x00\x00stainK\x01s\x86b.")
    with pytest.raises(DamagedCheckpoint, match="sets attributes of a type"):
        load()


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


@pytest.mark.parametrize("name", ["manifest.json", "actor/.metadata", "actor/__0_0.distcp", "data/data.pt"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(root, path, make_state, name):
    (path / name).unlink()
    os.mkfifo(path / name)
    for verify in ("full", "size", "off"):
        with pytest.raises(CheckpointError, match=str(path)):
            select(str(path), root, verify=verify)
            Checkpointer(root, seed=7).load(path, make_state(6), verify=verify)


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize("name", ["actor", "data", "actor/__0_0.distcp", "data/data.pt", "manifest.json"])
def test_a_link_out_of_the_checkpoint_is_refused(root, path, tmp_path, make_state, name, verify):
    """Even to the right bytes."""
    outside = (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match=f"{path / name}: is a symbolic link"):
        Checkpointer(root, seed=7).load(path, make_state(6), verify=verify)
    with pytest.raises(DamagedCheckpoint, match=f"{path / name}: is a symbolic link"):
        select("auto", root, verify=verify)


def test_a_link_to_a_whole_checkpoint_is_followed(root, path, tmp_path, make_state):
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert select("auto", root, verify="full").path == path
    state = make_state(6)
    Checkpointer(root, seed=7).load(path, state)
    assert torch.equal(state["model"]["layer.weight"], make_state(5)["model"]["layer.weight"])


@pytest.mark.parametrize("name", ["", ".", "actor/", "./actor/x", "actor//x", "a\nb", "\ud800", "../x", "/x", "a/../b"])
def test_names_in_a_manifest_have_one_spelling(path, rewrite_manifest, name):
    files = manifests.read(path).files
    rewrite_manifest(path, files={**files, name: files["data/data.pt"]})
    with pytest.raises(UnsafeCheckpoint, match=r"manifest\.json: names"):
        manifests.read(path)
