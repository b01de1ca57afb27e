"""Hostile files whose manifest agrees with them: refused with a clear error, and nothing in them runs."""

import io
import os
import pickle
import random
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
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
def marker(tmp_path):
    return tmp_path / "marker"


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


def test_a_pickle_cannot_change_classes(plant, load):
    """A pickle may set attributes of instances, but of no class, which would outlive the read."""
    name = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    plant("actor/.metadata", name + b"N}X\x05\x00\x00\x00stainK\x01s\x86b.")
    with pytest.raises(DamagedCheckpoint, match="sets attributes of a type"):
        load()


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
