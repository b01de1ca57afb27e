"""The manifest: its content, the damage it detects, and the names it refuses."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import PurePosixPath

import pytest

from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint, Manifest, NoCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.manifest import FileRecord

ALL_FILES = ["actor/.metadata", "actor/__0_0.distcp", "data/data.pt", "manifest.json"]
LISTED_FILES = ALL_FILES[:-1]


def verify(path, level="full"):
    manifests.read_verified(path, level)


@pytest.fixture
def path(save):
    return save(5, identity={"seed": 1})


def flip_bit(file, position, bit):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def test_round_trip(tmp_path):
    files = {"actor/x": FileRecord(size=3, digest="ab" * 32)}
    manifest = Manifest(step=5, world_size=2, files=files, info={"seed": 1, "list": [1, 2.5, None, "\u00e4"]})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert manifests.read(tmp_path) == manifest


def as_format_1(path):
    """What earlier versions wrote."""
    body = json.loads((path / "manifest.json").read_text())
    for name, record in body["files"].items():
        del record["blake3"]
        record["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    body["format"] = 1
    del body["digest"]
    (path / "manifest.json").write_text(json.dumps({**body, "digest": manifests._digest(body)}))


def test_a_manifest_with_sha256_is_read_and_verified(path):
    as_format_1(path)
    verify(path)
    flip_bit(path / "data" / "data.pt", 9, 3)
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt: its sha256 is not the one in the manifest"):
        verify(path)


def test_a_checkpoint_with_sha256_is_loaded_and_its_damage_is_noticed(path, make_state):
    as_format_1(path)
    state = make_state(1)
    Checkpointer(path.parent).load(path, state)
    flip_bit(path / "actor" / "__0_0.distcp", 400, 3)
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: its sha256 is not the one in the manifest"):
        Checkpointer(path.parent).load(path, state)


def test_info_that_json_spells_differently_still_agrees_with_its_digest(tmp_path):
    manifest = Manifest(step=5, world_size=1, files={}, info={"by_size": {10: "a", 9: "b"}, "pair": (1, 2)})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert manifests.read(tmp_path).info == {"by_size": {"10": "a", "9": "b"}, "pair": [1, 2]}


def test_a_fresh_checkpoint_verifies_and_lists_every_file(path):
    manifest = manifests.read(path)
    assert manifest.step == 5
    assert manifest.world_size == 1
    assert manifest.info == {"identity": {"seed": 1}}
    assert sorted(manifest.files) == LISTED_FILES
    verify(path)


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
def test_the_command_in_the_docstring_checks_it(path, b3sum):
    command = manifests.__doc__.split("``")[1]
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": OK") == len(LISTED_FILES)


def test_no_manifest_was_never_committed(path):
    (path / "manifest.json").unlink()
    with pytest.raises(NoCheckpoint, match="never committed"):
        verify(path)


@pytest.mark.parametrize("field", ["step", "world_size", "info", "files", "format"])
def test_an_edited_manifest_is_noticed(path, field):
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    body[field] = {"step": 6, "world_size": 2, "info": {}, "files": {}, "format": 1}[field]
    file.write_text(json.dumps(body))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        verify(path, "off")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', "{}", '{"digest": 1}', "\x00", '{"format": {}}'])
def test_what_is_no_manifest_is_damage(path, text):
    (path / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        manifests.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"},
        {"step": -1},
        {"world_size": 1.5},
        {"world_size": True},
        {"files": {"a": FileRecord(size=-1, digest="ab" * 32)}},
        {"files": {"a": FileRecord(size="1", digest="ab" * 32)}},
        {"files": {"a": FileRecord(size=1, digest="AB" * 32)}},
        {"files": {"a": FileRecord(size=1, digest=5)}},
        {"info": 5},
    ],
    ids=str,
)
def test_wrong_types_are_damage_even_with_a_right_digest(path, rewrite_manifest, changes):
    rewrite_manifest(path, **changes)
    with pytest.raises(DamagedCheckpoint):
        manifests.read(path)


def test_a_directory_renamed_to_another_step_is_refused(path):
    moved = path.rename(path.with_name("global_step_6"))
    with pytest.raises(DamagedCheckpoint, match="directory says step 6, its manifest says 5"):
        verify(moved)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "actor/../../outside"])
@pytest.mark.parametrize("level", manifests.LEVELS)
def test_a_path_out_of_the_checkpoint_is_refused(path, rewrite_manifest, name, level):
    record = manifests.read(path).files["data/data.pt"]
    rewrite_manifest(path, files={name: record})
    with pytest.raises(UnsafeCheckpoint, match="outside"):
        verify(path, level)


def test_a_link_to_a_file_is_refused_even_to_the_same_bytes(path, tmp_path):
    file = path / "data" / "data.pt"
    outside = tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match="symbolic link"):
        verify(path)


@pytest.mark.parametrize("name", ["actor", "actor/more"])
def test_a_link_to_a_directory_is_refused(path, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    if (path / name).exists():
        (path / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
    (path / name).symlink_to(elsewhere)
    with pytest.raises(UnsafeCheckpoint, match="symbolic link"):
        verify(path)


def test_a_linked_manifest_is_refused(path, tmp_path):
    outside = (path / "manifest.json").rename(tmp_path / "outside.json")
    (path / "manifest.json").symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match="symbolic link"):
        manifests.read(path)


def test_a_pipe_is_refused_and_not_waited_for(path, rewrite_manifest):
    os.mkfifo(path / "actor" / "pipe")
    files = manifests.read(path).files
    rewrite_manifest(path, files={**files, "actor/pipe": FileRecord(size=0, digest="0" * 64)})
    with pytest.raises(UnsafeCheckpoint, match="not a regular file"):
        verify(path)


@pytest.mark.parametrize("level", ["full", "size"])
def test_a_foreign_file_is_noticed(path, level):
    (path / "actor" / "__1_0.distcp").write_text("from another run")
    with pytest.raises(DamagedCheckpoint, match=r"actor/__1_0\.distcp is not in the manifest"):
        verify(path, level)


@pytest.mark.parametrize("level", ["full", "size"])
@pytest.mark.parametrize("name", LISTED_FILES)
def test_a_missing_file_is_noticed(path, name, level):
    (path / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{PurePosixPath(name).name} is missing"):
        verify(path, level)


@pytest.mark.parametrize("level", ["full", "size"])
@pytest.mark.parametrize("name", LISTED_FILES)
def test_truncation_is_noticed_everywhere(path, name, level):
    size = (path / name).stat().st_size
    for shorter in (size - 1, size // 2, 0):
        os.truncate(path / name, shorter)
        with pytest.raises(DamagedCheckpoint, match=f"{shorter} bytes, the manifest says {size}"):
            verify(path, level)


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_flipped_bit_is_noticed(path, name):
    chance, file = random.Random(name), path / name
    original = file.read_bytes()
    for _ in range(40):
        flip_bit(file, chance.randrange(len(original)), chance.randrange(8))
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            verify(path)
        file.write_bytes(original)
    verify(path)


def test_other_bytes_of_the_same_size_are_noticed_by_their_hash(path):
    (path / "actor" / "__0_0.distcp").write_bytes(bytes(manifests.read(path).files["actor/__0_0.distcp"].size))
    verify(path, "size")
    with pytest.raises(DamagedCheckpoint, match="blake3"):
        verify(path, "full")


def test_swapped_files_are_noticed(path):
    one, other = path / "actor" / "__0_0.distcp", path / "data" / "data.pt"
    between = one.rename(path / "between")
    other.rename(one)
    between.rename(other)
    with pytest.raises(DamagedCheckpoint):
        verify(path)


def test_off_looks_at_the_manifest_alone(path):
    shutil.rmtree(path / "actor")
    verify(path, "off")


def test_an_unknown_level_is_no_level(path):
    with pytest.raises(ValueError, match="full, size, off"):
        verify(path, "Full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_damage(path):
    (path / "data" / "data.pt").chmod(0)
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        verify(path)
