"""Files as training scripts save them: written tensor by tensor, read without running anything in them."""

import argparse
import io
import os
import pathlib
import pickle
import random
import signal
import types
import zipfile
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from rlinf_lite.checkpoint import Copied, DamagedCheckpoint, Lazy, UnsafeCheckpoint
from rlinf_lite.checkpoint.formats.section_content import _leaves
from rlinf_lite.checkpoint.formats.tensor_writer import TorchFile, own
from rlinf_lite.checkpoint.formats.training_file import Record, read_training_file
from rlinf_lite.checkpoint.live import exact

CONTENT = {
    "args": argparse.Namespace(layers=2, dtype=torch.bfloat16, betas=(0.9, 0.95), path=None),
    "model": OrderedDict(
        {
            "transposed": torch.arange(12.0).view(3, 4).T,
            "view": torch.arange(100)[10:20],
            "half": torch.ones(5, dtype=torch.bfloat16),
            "flags": torch.tensor([True, False]),
            "number": torch.tensor(3.5),
            "empty": torch.empty(0, 4),
            "x._extra_state": None,
        }
    ),
    0: {(torch.bfloat16, torch.float32): {"param": torch.randn(3000), "numel_unpadded": 3000}},
    "rng_state": [
        {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "tracker": {}}
    ],
    "extra": io.BytesIO(b"bytes"),
}


def written(content):
    file, stream = TorchFile.of(content), io.BytesIO()
    file.write(stream, lambda held: nullcontext(exact(held)) if isinstance(held, torch.Tensor) else own(held))
    return stream.getvalue()


def assert_same(one, other):
    one, other = dict(_leaves("", one)), dict(_leaves("", other))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == other[name].dtype and torch.equal(leaf, other[name]), name
        else:
            assert type(leaf) is type(other[name]) and leaf == other[name], name


def test_stock_torch_reads_what_is_written_here(tmp_path):
    file = tmp_path / "content.pt"
    file.write_bytes(written(CONTENT))
    assert_same(torch.load(file, weights_only=False), CONTENT)
    assert_same(torch.load(file, weights_only=False, mmap=True), CONTENT)
    with zipfile.ZipFile(file) as archive:
        starts = [info.header_offset for info in archive.infolist()]
        assert archive.namelist()[0].endswith("/data.pkl") and starts == sorted(starts)


@pytest.mark.parametrize("write", [written, None], ids=["here", "by torch.save"])
def test_reading_gives_what_was_saved(tmp_path, write):
    file = tmp_path / "content.pt"
    file.write_bytes(write(CONTENT)) if write else torch.save(CONTENT, file)
    before = file.read_bytes()
    read = read_training_file(file)
    assert_same(read, CONTENT)
    random.setstate(read["rng_state"][0]["random"])
    np.random.set_state(read["rng_state"][0]["numpy"])
    read[0][torch.bfloat16, torch.float32]["param"].zero_()  # a view of private pages
    assert file.read_bytes() == before


def test_a_tensor_is_made_when_it_is_written(tmp_path):
    made = []

    def make():
        made.append(True)
        return torch.full((4, 2), 7.0)

    content = {"lazy": Lazy(shape=(4, 2), dtype=torch.float32, make=make), "copied": Copied(torch.ones(3))}
    file, stream = TorchFile.of(content), io.BytesIO()
    assert not made
    file.write(stream, own)
    assert made == [True]
    stream.seek(0)
    read = torch.load(stream)
    assert torch.equal(read["lazy"], torch.full((4, 2), 7.0)) and torch.equal(read["copied"], torch.ones(3))


def test_a_tensor_of_a_type_without_storages_is_refused():
    with pytest.raises(TypeError, match="float8_e5m2"):
        TorchFile.of({"w": torch.zeros(3, dtype=torch.float8_e5m2)})


def test_known_classes_of_other_programs_are_plain_data(tmp_path):
    file = tmp_path / "content.pt"
    torch.save({"a": signal.SIGTERM, "b": types.SimpleNamespace(x=1), "c": pathlib.PurePosixPath("/a/b")}, file)
    read = read_training_file(file)
    assert read["a"] == Record("signal.Signals", (15,))
    assert read["b"] == argparse.Namespace(x=1)
    assert read["c"].name == "pathlib.PurePosixPath" and read["c"].args == ("/", "a", "b")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Runs(), "mkdir, which no checkpoint needs"),
        (np.array([{}], dtype=object), "not of numbers"),
        (np.zeros(2, dtype=[("a", "f4")]), "not of numbers"),
        (np.zeros(2, dtype=">f4"), "not of numbers|little-endian"),
        (np.datetime64("2020-01-01"), "not of numbers"),
        (types.SimpleNamespace, None),
        (random.Random(), "random.Random, which no checkpoint needs"),
        (print, "print, which no checkpoint needs"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, monkeypatch, value, reason):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "content.pt"
    torch.save({"x": value}, file)
    if reason is None:
        read_training_file(file)  # a class alone does nothing
        return
    with pytest.raises(DamagedCheckpoint, match=reason) as caught:
        read_training_file(file)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("opcode", [pickle.REDUCE, pickle.NEWOBJ])
def test_a_stand_in_makes_nothing_itself(tmp_path, opcode):
    """``numpy.ndarray(shape)`` would allocate whatever a file asks for."""
    program = b"\x80\x02cnumpy\nndarray\n(J\x00\x00\x00\x7ftq\x00" + opcode + b"."
    file = tmp_path / "content.pt"
    torch.save(0, file)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        read_training_file(file)


def test_flipped_bits_raise_or_read_and_nothing_else(tmp_path):
    """Every damaged file is an error of ours, or another plain value."""
    small = {"args": argparse.Namespace(a=1), "n": np.random.get_state(), "t": torch.ones(3), "b": io.BytesIO(b"x")}
    torch.save(small, tmp_path / "good.pt")
    good, chance = (tmp_path / "good.pt").read_bytes(), random.Random(7)
    start = good.index(b"data.pkl") + 8
    refused = 0
    for _ in range(400):
        content = bytearray(good)
        content[chance.randrange(start, start + 700)] ^= 1 << chance.randrange(8)
        (tmp_path / "bad.pt").write_bytes(content)
        try:
            read_training_file(tmp_path / "bad.pt")
        except DamagedCheckpoint:
            refused += 1
    assert refused > 50


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"none\.pt: is missing"):
        read_training_file(tmp_path / "none.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(DamagedCheckpoint, match="is empty"):
        read_training_file(tmp_path / "empty.pt")


def test_a_class_of_megatron_that_is_not_on_the_list(tmp_path):
    program = b"\x80\x02cmegatron.core.somewhere\nThing\n."
    file = tmp_path / "content.pt"
    torch.save(0, file)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    with pytest.raises(UnsafeCheckpoint, match=r"megatron\.core\.somewhere\.Thing"):
        read_training_file(file)
