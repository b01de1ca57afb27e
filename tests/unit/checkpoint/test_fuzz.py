"""Readers over damaged bytes: they raise only the documented errors, in time, and nothing in the bytes runs."""

import io
import pickle
import pickletools
import resource
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, read_data
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader
from rlinf_lite.checkpoint.formats.read_state import read_tensors

EXAMPLES, SOAK_EXAMPLES = 100, 20_000
SECONDS = 20  # for one example, on a busy machine
MEMORY = 2 << 30
SHARD, METADATA, DATA, MANIFEST = "actor/__0_0.distcp", "actor/.metadata", "data/data.pt", "manifest.json"

RUN_EVENTS = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.mkdir",
    "os.remove",
    "subprocess.Popen",
    "socket.connect",
}
"""Audit events of a hostile pickle. The readers never let pickle look up a name by itself."""

events = None


def _listen(event, arguments):
    if events is not None and event in RUN_EVENTS:
        events.append((event, arguments))


sys.addaudithook(_listen)


def make_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"w": torch.randn(6, 4, generator=generator), "b": torch.randn(3, generator=generator).bfloat16()}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    data = {"progress": {"step": 5, "tokens": [1, 2.5, None, True, "x", b"y", {3}, (4,)]}, "cursor": torch.arange(3)}
    root = tmp_path_factory.mktemp("fuzz")
    return Checkpointer(root, seed=7).save(5, make_state(5), data=data, info={"identity": {"seed": 1}}).path


@pytest.fixture
def bounded_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# -- bytes

NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]
places = st.integers(0, 2**16)
edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(st.just("number"), places, st.sampled_from(NUMBERS), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("copy"), places, places, st.integers(1, 64)),
    st.tuples(st.just("remove"), places, st.integers(1, 64)),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("end"), places),
)


def edited(original, changes):
    content = bytearray(original)
    for what, place, *rest in changes:
        at = place % (len(content) + 1)
        if what == "flip" and at < len(content):
            content[at] ^= 1 << rest[0]
        elif what == "number":
            content[at : at + rest[1]] = (rest[0] % 256 ** rest[1]).to_bytes(rest[1], "little")
        elif what == "copy":
            source = rest[0] % (len(content) + 1)
            content[at : at + rest[1]] = content[source : source + rest[1]]
        elif what == "remove":
            del content[at : at + rest[0]]
        elif what == "insert":
            content[at:at] = rest[0]
        elif what == "end":
            del content[at:]
    return bytes(content)


def mutated(original):
    """Any bytes, or those of a valid file with a few changes."""
    changes = st.lists(edits, min_size=1, max_size=6)
    return st.one_of(st.binary(max_size=200), *[changes.map(lambda some: edited(original, some))] * 4)


# -- pickles with other opcodes

FOREIGN = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"ctorch\nTensor\n", b"ctorch\nSize\n",
    b"ctorch\nfloat32\n", b"c__builtin__\nset\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n",
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"X\x02\x00\x00\x00id", b"X\x07\x00\x00\x00storage", b"r\xff\xff\xff\xff", b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
    b"\x8b\xff\xff\xff\x7f", b"R", b"\x81", b"\x92", b"b", b"0", b"2", b"(", b"t", b"]", b"}", b")", b"a", b"s", b"u",
    b"e", b"\x85", b"\x86", b"\x87", b"N", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8, b"Q", b"i", b"o",
    b"h\x00", b"h\x05", b"G\x7f\xf0" + bytes(6), b"\x82\x01", b"\x88", b"\x90", b"\x91", b"\x8f", b".",
]  # fmt: skip


def opcodes(pickled):
    starts = [place for _, _, place in pickletools.genops(pickled)]
    return [pickled[start:end] for start, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]


opcode_edits = st.tuples(
    st.sampled_from(["drop", "swap", "repeat", "replace", "insert"]), places, st.sampled_from(FOREIGN)
)


def edited_opcodes(codes, changes):
    codes = list(codes)
    for what, place, foreign in changes:
        at = place % len(codes)
        if what == "drop" and len(codes) > 1:
            del codes[at]
        elif what == "swap":
            codes[at], codes[at - 1] = codes[at - 1], codes[at]
        elif what == "repeat":
            codes.insert(at, codes[at])
        elif what == "replace":
            codes[at] = foreign
        elif what == "insert":
            codes.insert(at, foreign)
    return b"".join(codes)


def mutated_pickle(original):
    codes, changes = opcodes(original), st.lists(opcode_edits, min_size=1, max_size=6)
    return changes.map(lambda some: edited_opcodes(codes, some))


def rezipped(archive, pickled):
    """A file of torch.save with its pickle replaced."""
    source, target = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            out.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return target.getvalue()


def mutated_zip(archive):
    pickled = zipfile.ZipFile(io.BytesIO(archive)).read("archive/data.pkl")
    return mutated_pickle(pickled).map(lambda changed: rezipped(archive, changed))


def stock_metadata(path):
    """The metadata in pickle protocol 2, which has no frames, so that single opcodes can be changed."""
    return pickle.dumps(pickle.loads((path / METADATA).read_bytes()), 2)


def mutated_entry(path):
    """The shard, with another pickle of the same length in its first entry."""
    shard = (path / SHARD).read_bytes()
    start = shard.index(b"\x80\x02ctorch._utils")
    end = next(place for code, _, place in pickletools.genops(shard[start:]) if code.name == "STOP") + 1
    codes = opcodes(shard[start : start + end])
    changes = st.lists(opcode_edits, min_size=1, max_size=6)
    return changes.map(
        lambda some: shard[:start] + edited_opcodes(codes, some)[:end].ljust(end, b".") + shard[start + end :]
    )


# -- readers


def load(path):
    """Load into a state of the right form, without a manifest."""
    ShardReader(path / "actor").read(make_state(0))


def mutated_file(file):
    return lambda path: mutated((path / file).read_bytes())


def mutated_metadata(path):
    return mutated_pickle(stock_metadata(path))


def every_tensor(path):
    return read_tensors(path / "actor")


CASES = {
    "manifest, bytes": (MANIFEST, manifests.read, mutated_file(MANIFEST)),
    "metadata, bytes": (METADATA, every_tensor, mutated_file(METADATA)),
    "metadata, opcodes": (METADATA, load, mutated_metadata),
    "metadata, opcodes, all tensors": (METADATA, every_tensor, mutated_metadata),
    "shard, bytes": (SHARD, every_tensor, mutated_file(SHARD)),
    "shard, opcodes": (SHARD, load, mutated_entry),
    "data, bytes": (DATA, read_data, mutated_file(DATA)),
    "data, opcodes": (DATA, read_data, lambda path: mutated_zip((path / DATA).read_bytes())),
}


def fuzz(path, case, examples, *, derandomize):
    """Returns how many were refused, and how many were read."""
    name, read, strategy = CASES[case]
    file, outcomes = path / name, [0, 0]
    original = file.read_bytes()

    def attempt(content):
        global events
        file.write_bytes(content)
        began, events = time.monotonic(), []
        try:
            read(path)
            outcomes[1] += 1
        except CheckpointError as error:
            outcomes[0] += 1
            assert str(path) in str(error)
        finally:
            seen, events = events, None
        assert not seen
        assert time.monotonic() - began < SECONDS

    run = settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run(given(strategy(path))(attempt))()
    finally:
        file.write_bytes(original)
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_only_documented_errors_come_out(path, bounded_memory, case):
    refused, _ = fuzz(path, case, EXAMPLES, derandomize=True)
    assert refused > EXAMPLES // 5


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES)
def test_only_documented_errors_come_out_of_many(path, bounded_memory, case):
    fuzz(path, case, SOAK_EXAMPLES, derandomize=False)


def test_the_audit_hook_records_a_name_lookup():
    global events
    events = []
    try:
        pickle.loads(b"cos\ngetcwd\n.")
        seen = events
    finally:
        events = None
    assert seen == [("pickle.find_class", ("os", "getcwd"))]
