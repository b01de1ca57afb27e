"""The commands that remove or protect checkpoints: rm, prune and pin."""

import shutil

import pytest

from rlinf_lite.checkpoint import layout, storage


def flip(file, offset=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("number", [10, 20, 30])
def test_rm_refuses(save, root, cli, number):
    save(10), save(20), save(30)
    layout.pin_file(root / "global_step_10").write_bytes(b"")
    why = {10: "is pinned", 20: "is in use", 30: "is the newest checkpoint"}[number]
    path = root / f"global_step_{number}"
    with storage.in_use(root / "global_step_20" / "manifest.json"):
        code, _, error = cli("rm", path)
        assert code == 2
        assert f"{path} {why}; --force removes it all the same" in error
        assert len(layout.committed(root)) == 3
        assert cli("rm", path, "--force")[0] == 0
    assert path not in layout.committed(root)
    assert not layout.pin_file(path).exists()


def test_rm_removes_all_or_none(save, root, cli, cli_json):
    paths = save(10), save(20), save(30)
    assert cli("rm", *paths)[0] == 2
    assert len(layout.committed(root)) == 3
    code, said = cli_json("rm", *paths[:2], f"{paths[0]}/")
    assert (code, said) == (0, {"removed": [str(paths[0]), str(paths[1])]})
    assert [path.name for path in root.iterdir()] == ["global_step_30"]


def test_rm_keeps_the_newest_readable_one(save, root, cli):
    save(10), save(20)
    (save(30) / "manifest.json").write_bytes(b"{}")
    assert "is the newest checkpoint" in cli("rm", root / "global_step_20")[2]
    assert "is the newest checkpoint" in cli("rm", root / "global_step_30")[2]
    assert cli("rm", root / "global_step_30", "--force")[0] == 0
    assert cli("rm", root / "global_step_10")[0] == 0


def test_rm_of_leftovers(mixed, cli):
    leftovers = [path for path in mixed.iterdir() if "." in path.name and path.is_dir()]
    assert len(leftovers) == 3
    assert cli("rm", *leftovers)[0] == 0
    assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize("name", ["notes", "none", "."])
def test_rm_refuses_what_is_no_checkpoint(mixed, cli, name):
    before = sorted(mixed.rglob("*"))
    code, _, error = cli("rm", mixed / name, "--force")
    assert code == 2
    assert "is neither a checkpoint nor a leftover of one" in error
    assert sorted(mixed.rglob("*")) == before


def test_rm_refuses_a_directory_without_manifest_and_a_link(mixed, cli, tmp_path):
    assert "has no manifest" in cli("rm", mixed / "global_step_60")[2]
    (mixed / "global_step_70").symlink_to(mixed / "global_step_10")
    assert "is a link" in cli("rm", mixed / "global_step_70", "--force")[2]
    assert (mixed / "global_step_10" / "manifest.json").is_file()


def test_pin(save, root, cli, cli_json):
    path = save(10)
    assert cli("pin", path)[:2] == (0, f"pinned: {path}\n")
    assert layout.is_pinned(path)
    assert cli_json("pin", path) == (0, {"path": str(path), "pinned": True})
    assert cli("pin", path, "--remove")[:2] == (0, f"not pinned: {path}\n")
    assert cli("pin", path, "--remove")[0] == 0
    assert sorted(entry.name for entry in root.iterdir()) == ["global_step_10"]
    assert "not a committed checkpoint" in cli("pin", root / "global_step_11")[2]


def test_relative_names(save, root, cli, monkeypatch):
    save(10), save(20)
    monkeypatch.chdir(root / "global_step_10")
    assert cli("pin", ".")[:2] == (0, f"pinned: {root}/global_step_10\n")
    assert "is pinned" in cli("rm", ".")[2]
    assert "is the newest" in cli("rm", "../global_step_10/../global_step_20")[2]


# prune


@pytest.fixture
def gone_back(save, root):
    """Two checkpoints, and one set aside before, between and after them; one of them is pinned, one in use."""
    for step in (5, 10, 15, 30):
        layout.set_aside(save(step), layout.DAMAGED if step == 15 else layout.SUPERSEDED)
    save(10), save(20)
    shutil.copytree(root / "global_step_10", root / "global_step_25.tmp-ab")
    return root


def steps_aside(root):
    return sorted(int(path.name.split("_")[2].split(".")[0]) for path in layout.set_aside_in(root))


def test_prune_removes_what_was_set_aside_before_a_checkpoint_that_verifies(gone_back, cli, cli_json):
    root = gone_back
    (pinned,) = root.glob("global_step_5.*")
    layout.pin_file(pinned).touch()
    code, out, _ = cli("prune", root.parent, "--dry-run")
    assert code == 0 and steps_aside(root) == [5, 10, 15, 30]
    assert [line.split()[0] for line in out.splitlines()] == ["kept", "would", "would", "kept"]
    flip(root / "global_step_20" / "actor" / "__0_0.distcp")
    code, found = cli_json("prune", root)
    assert [entry["kept"] for entry in found] == ["pinned", None, *["no checkpoint of step 15 or later verifies"], *[
        "no checkpoint of step 30 or later verifies"]]  # fmt: skip
    assert steps_aside(root) == [5, 15, 30]
    with storage.in_use(next(root.glob("global_step_15.*")) / "manifest.json"):
        assert "in use" in cli("prune", root, "--force")[1]
    assert steps_aside(root) == [5, 15] and cli("prune", root, "--force")[0] == 0
    assert steps_aside(root) == [5], "a pin counts, whatever is asked for"
    assert (root / "global_step_25.tmp-ab").is_dir(), "a save in flight is none of its business"
    assert [layout.step_of(path) for path in layout.committed(root)] == [20, 10]


def test_prune_never_removes_the_only_good_copy(save, root, cli):
    aside = layout.set_aside(save(5))
    assert "kept" in cli("prune", root)[1] and aside.is_dir()
    flip(save(5) / "data" / "data.pt")
    assert "kept" in cli("prune", root)[1] and aside.is_dir()
    assert cli("prune", root / "none")[0] == 2
