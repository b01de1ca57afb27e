"""Damage of every kind at random places: always detected by both ways to load, and stepped over by ``auto``.

Each run prints its seed; ``RLINF_LITE_DAMAGE_SEED=... pytest`` repeats it.
"""

import dataclasses
import json
import os
import random
import shutil

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, select
from rlinf_lite.checkpoint import manifest as manifests

SEED_VARIABLE = "RLINF_LITE_DAMAGE_SEED"
FILES = ("actor/.metadata", "actor/__0_0.distcp", "data/data.pt", "manifest.json")
LISTED = FILES[:-1]
OLD, OTHER, NEW = 4, 6, 8


def flip_bits(chance, path, other):
    file = path / chance.choice(FILES)
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 9])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(chance, path, other):
    file = path / chance.choice(FILES)
    os.truncate(file, chance.randrange(file.stat().st_size))


def empty(chance, path, other):
    (path / chance.choice(FILES)).write_bytes(b"")


def grow(chance, path, other):
    with (path / chance.choice(LISTED)).open("ab") as file:
        file.write(chance.randbytes(chance.choice([1, 512, 4096])))


def zero_a_block(chance, path, other):
    """What a file system may leave after a power cut."""
    file = path / chance.choice(FILES)
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice([1, 64, 512, 4096]))
    assert any(content), file
    if not any(content[start:end]):
        start, end = 0, len(content)
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def repeat_a_block(chance, path, other):
    """A block that was written to the wrong place."""
    file = path / chance.choice(FILES)
    content = file.read_bytes()
    length = chance.randrange(1, min(512, len(content) // 2))
    changed = content
    while changed == content:
        source, target = (chance.randrange(len(content) - length) for _ in range(2))
        changed = content[:target] + content[source : source + length] + content[target + length :]
    file.write_bytes(changed)


def lose(chance, path, other):
    (path / chance.choice(FILES)).unlink()


def lose_a_directory(chance, path, other):
    shutil.rmtree(path / chance.choice(["actor", "data"]))


def swap(chance, path, other):
    one, two = chance.sample(FILES, 2)
    contents = (path / one).read_bytes(), (path / two).read_bytes()
    (path / one).write_bytes(contents[1])
    (path / two).write_bytes(contents[0])


def take_from_another_step(chance, path, other):
    """The other one's shard is of the same size."""
    name = chance.choice(["actor/__0_0.distcp", "data/data.pt", "manifest.json"])
    assert (path / name).read_bytes() != (other / name).read_bytes()
    shutil.copy(other / name, path / name)


def add_a_file(chance, path, other):
    name = chance.choice(["x", "actor/__1_0.distcp", "actor/x/y", "data/data.pt.tmp"])
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(chance.randbytes(chance.randrange(100)))


def edit_the_manifest(chance, path, other):
    """By somebody who does not know of its digest."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    name, field = (
        chance.choice(LISTED),
        chance.choice(["step", "world_size", "size", "blake3", "files", "info", "digest"]),
    )
    if field in ("step", "world_size"):
        body[field] += chance.randrange(1, 9)
    elif field in ("size", "blake3"):
        body["files"][name][field] = {"size": chance.randrange(9), "blake3": chance.randbytes(32).hex()}[field]
    elif field == "files":
        del body["files"][name]
    elif field == "info":
        body["info"]["seed"] = chance.random()
    else:
        body["digest"] = chance.randbytes(32).hex()
    file.write_text(json.dumps(body))


def edit_the_manifest_and_its_digest(chance, path, other):
    """By somebody who does: what it says of the files is then not true."""
    manifest = manifests.read(path)
    name = chance.choice(LISTED)
    files = dict(manifest.files)
    record = files.pop(name)
    change = chance.choice(["step", "size", "blake3", "gone"])
    if change == "size":
        files[name] = dataclasses.replace(record, size=record.size + chance.choice([-1, 1, 100]))
    elif change == "blake3":
        files[name] = dataclasses.replace(record, digest=chance.randbytes(32).hex())
    elif change == "step":
        manifest, files[name] = dataclasses.replace(manifest, step=chance.choice([OLD, OTHER, 80])), record
    (path / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())


def rename_to_another_step(chance, path, other):
    path.rename(path.with_name("global_step_9"))


KINDS = [flip_bits] * 4 + [
    truncate, empty, grow, zero_a_block, repeat_a_block, lose, lose_a_directory, swap, take_from_another_step,
    add_a_file,
    edit_the_manifest, edit_the_manifest_and_its_digest, rename_to_another_step,
]  # fmt: skip


@pytest.fixture
def chance():
    seed = int(os.environ.get(SEED_VARIABLE, random.SystemRandom().randrange(2**32)))
    print(f"{SEED_VARIABLE}={seed}")  # pytest shows it when the test fails
    return random.Random(seed)


@pytest.fixture
def good(save, root):
    """An old checkpoint, one of another step to take files from, and the newest, which is to be damaged."""
    save(OLD)
    other = save(OTHER).rename(root.parent / "other")
    return save(NEW), other


def snapshot(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def restore(directory, content):
    shutil.rmtree(directory)
    for name, data in content.items():
        if data is not None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)


def assert_noticed(root, checkpointer, make_state):
    """Three ways to see it; none of them touches anything."""
    (newest,) = [path for path in root.iterdir() if path.name != f"global_step_{OLD}"]
    before = snapshot(root)

    chosen = select("auto", root, verify="full")
    assert chosen.path == root / f"global_step_{OLD}"
    assert len(chosen.skipped) == 1
    assert str(newest) in chosen.skipped[0]
    assert chosen.skipped[0].split(str(newest))[1].strip(": /"), "says why"

    with pytest.raises(CheckpointError, match=str(newest)):
        checkpointer.load(newest, make_state(0), verify="full")

    # What a run does: sizes first, hashes while the tensors are read, and another choice if that fails.
    damaged = {}
    while True:
        chosen = select("auto", root, verify="size", damaged=damaged)
        try:
            state = make_state(0)
            checkpointer.load(chosen.path, state, verify="full")
            break
        except CheckpointError as error:
            damaged[chosen.path] = str(error)
    assert chosen.path == root / f"global_step_{OLD}"
    assert torch.equal(state["model"]["layer.weight"], make_state(OLD)["model"]["layer.weight"])
    assert chosen.data == {"progress": {"step": OLD}}
    assert snapshot(root) == before


def injure(count, root, good, make_state, chance):
    path, other = good
    content, checkpointer = snapshot(root), Checkpointer(root, seed=7)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        kind(chance, path, other)
        assert snapshot(root) != content, kind.__name__
        try:
            assert_noticed(root, checkpointer, make_state)
        except BaseException:
            print(f"damage {number}: {kind.__name__}")
            raise
        restore(root, content)
    assert select("auto", root, verify="full").path == path


def test_damage_is_noticed_and_stepped_over(root, good, make_state, chance):
    injure(6 * len(KINDS), root, good, make_state, chance)


@pytest.mark.soak
def test_much_damage_is_noticed_and_stepped_over(root, good, make_state, chance):
    injure(3400, root, good, make_state, chance)


@pytest.mark.parametrize("kind", sorted(set(KINDS), key=lambda kind: kind.__name__))
def test_each_kind_of_damage(root, good, make_state, kind):
    """Every kind by itself, always in the same places."""
    path, other = good
    content, checkpointer = snapshot(root), Checkpointer(root, seed=7)
    for number in range(4):
        kind(random.Random(number), path, other)
        assert_noticed(root, checkpointer, make_state)
        restore(root, content)


@pytest.mark.parametrize("name", FILES)
def test_every_part_of_a_file_counts(root, good, name):
    """One bit at 150 places of each file, evenly from its first byte to its end."""
    file = good[0] / name
    content = bytearray(file.read_bytes())
    for position in range(0, len(content), max(1, len(content) // 150)):
        content[position] ^= 1 << position % 8
        file.write_bytes(content)
        assert select("auto", root, verify="full").manifest.step == OLD, position
        content[position] ^= 1 << position % 8
    file.write_bytes(content)
    assert select("auto", root, verify="full").manifest.step == NEW
