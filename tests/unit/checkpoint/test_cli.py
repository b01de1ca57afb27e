"""The command line on real checkpoints: intact, pinned, damaged, incomplete, and behind URLs."""

import math
import os
import pickle
import re
import shutil
import subprocess

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlinf_lite.checkpoint import Checkpointer, storage
from rlinf_lite.checkpoint.cli import compare
from rlinf_lite.checkpoint.cli.command import main
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata


def save_as(root, step, state, data=None, **info):
    return Checkpointer(root, seed=7).save(step, state, data=data or {"progress": {"step": step}}, info=info).path


def flip(file, offset=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    file.write_bytes(content)


# ls


def test_ls_says_what_each_entry_is(mixed, cli_json):
    with storage.in_use(mixed / "global_step_10" / "manifest.json"):
        code, found = cli_json("ls", mixed)
    assert code == 0
    assert [(entry["step"], entry["state"]) for entry in found] == [
        (60, "no manifest"), (50, "superseded"), (40, "unfinished save"), (30, "damaged manifest"),
        (20, "committed"), (10, "committed"), (5, "half deleted"),
    ]  # fmt: skip
    by_step = {entry["step"]: entry for entry in found}
    assert by_step[10]["metrics"] == {"reward": 0.25, "loss": "nan"}
    assert [step for step, entry in by_step.items() if entry["pinned"]] == [20]
    assert [step for step, entry in by_step.items() if entry["in_use"]] == [10]
    assert "not a manifest" in by_step[30]["reason"]
    files = [file for file in (mixed / "global_step_20").rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert by_step[20]["num_bytes"] == sum(file.stat().st_size for file in files)
    assert by_step[20]["num_ranks"] == {"actor": 1}
    assert by_step[20]["saved_at"].startswith("2")


def test_ls_for_a_person(mixed, cli):
    code, out, _ = cli("ls", mixed.parent)  # the directory of the run
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["name", "saved", "age", "size", "ranks"]
    assert [line.split()[0].split(".")[0].removeprefix("global_step_") for line in lines[1:]] == [
        "60", "50", "40", "30", "20", "10", "5",
    ]  # fmt: skip
    assert lines[5].endswith("pinned")
    assert re.search(r" s +\d+\.\d kB +1  reward 0\.25, loss nan$", lines[6])
    assert lines[6].index(" s ") == lines[5].index(" s ")


def test_ls_shows_the_metrics_asked_for(mixed, cli):
    out = cli("ls", mixed, "--metric", "reward", "--metric", "other")[1]
    assert "reward 0.25" in out
    assert "loss" not in out


def test_ls_of_an_empty_directory_and_of_none(tmp_path, cli):
    assert cli("ls", tmp_path)[:2] == (0, "no checkpoints\n")
    code, out, error = cli("ls", tmp_path / "none")
    assert (code, out, error) == (2, "", f"error: {tmp_path}/none: no such directory\n")


def test_ls_of_a_checkpoint_points_to_show(save, cli):
    code, _, error = cli("ls", save(5))
    assert code == 2
    assert "use show" in error


def test_ls_of_the_current_directory(mixed, cli, monkeypatch):
    monkeypatch.chdir(mixed)
    assert "global_step_20" in cli("ls")[1]


# show


def test_show(save, cli, cli_json):
    path = save(5, identity={"seed": 3}, metrics={"reward": 0.5})
    code, shown = cli_json("show", path)
    assert code == 0
    assert shown["found"]["step"] == 5
    assert shown["info"] == {"identity": {"seed": 3}, "metrics": {"reward": 0.5}}
    model_bytes = 16 * 8 * 4 + 5 * 3 * 2 + 7
    assert list(shown["sections"]) == ["actor"] and shown["found"]["num_ranks"] == {"actor": 1}
    parts = shown["sections"]["actor"]
    assert parts["model"] == {"num_tensors": 4, "num_elements": 150, "num_bytes": model_bytes}
    assert parts["optim"] == {"num_tensors": 3, "num_elements": 132, "num_bytes": 4 + 512 + 24}
    assert set(parts) == {"model", "optim", "rng"}
    assert "actor/.metadata" in shown["files"]
    out = cli("show", path)[1]
    assert "model: 4 tensors, 150 elements, 549 B" in out
    assert "model parameters: 150" in out
    assert '"seed": 3' in out


def test_show_of_none_and_of_a_hostile_one(save, tmp_path, cli):
    assert "never committed" in cli("show", tmp_path)[2]
    path = save(5)
    (path / "actor" / ".metadata").write_bytes(pickle.dumps(os.system))
    code, _, error = cli("show", path)
    assert code == 2
    assert "asks for posix.system" in error


def test_names_do_not_speak_to_the_terminal(save, cli):
    path = save(5, note="\x1b[2J", metrics={"\x1b]0;x\x07": 1.0, "\ud800": 2.0})
    for arguments in (("ls", path.parent), ("show", path), ("ls", path.parent, "--json")):
        code, out, _ = cli(*arguments)
        assert code == 0
        assert "\x1b" not in out
        out.encode()


# verify


def test_verify_says_which_and_why(save, root, cli, cli_json):
    save(5), flip(save(6) / "actor" / "__0_0.distcp"), save(7)
    code, out, _ = cli("verify", root)
    assert code == 1
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "BAD", "ok"]
    assert re.fullmatch(rf"ok +{root}/global_step_7: [\d.]+ kB in [\d.]+ s \([\d.]+ GB/s\)", lines[0])
    assert lines[1] == f"BAD  {root}/global_step_6: {root}/global_step_6/actor/__0_0.distcp: its blake3 is not " + (
        "the one in the manifest"
    )
    assert [entry["ok"] for entry in cli_json("verify", root)[1]] == [True, False, True]
    assert cli("verify", root / "global_step_5", root / "global_step_7")[0] == 0
    assert cli("verify", root / "global_step_6")[0] == 1


def test_verify_by_size_sees_a_torn_file_only(save, cli):
    path = save(5)
    flip(path / "data" / "data.pt")
    code, out, _ = cli("verify", path, "--level", "size")
    assert code == 0
    assert "sizes of" in out
    (path / "data" / "data.pt").write_bytes(b"half")
    code, out, _ = cli("verify", path, "--level", "size")
    assert code == 1
    assert "data.pt: 4 bytes, the manifest says" in out


def test_verify_of_what_is_none(save, root, tmp_path, cli):
    assert cli("verify", root)[0] == 2
    save(5)
    code, out, _ = cli("verify", root / "global_step_6")
    assert code == 1
    assert out.startswith("BAD")
    (root / "global_step_5" / "manifest.json").unlink()
    assert cli("verify", root)[0] == 1


def test_the_check_by_other_commands_is_told_and_right(save, cli, capsys, b3sum):
    path = save(5)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--help"])
    assert ended.value.code == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "b3sum" in line and "jq -r" in line)
    if shutil.which("jq") is None:
        pytest.skip("needs jq")
    assert subprocess.run(command, shell=True, cwd=path, capture_output=True, check=False).returncode == 0
    flip(path / "data" / "data.pt")
    assert subprocess.run(command, shell=True, cwd=path, capture_output=True, check=False).returncode != 0


# diff


@pytest.fixture
def two(tmp_path, make_state):
    """Two states, equal until a test changes one, and a function that saves and compares them."""
    a, b = make_state(5), make_state(5)
    torch.manual_seed(0)

    def save_both(data_a=None, data_b=None, info_a=None, info_b=None):
        random_state = torch.get_rng_state()
        path_a = save_as(tmp_path / "a", 5, a, data_a, **(info_a or {}))
        torch.set_rng_state(random_state)
        return path_a, save_as(tmp_path / "b", 5, b, data_b, **(info_b or {}))

    return a, b, save_both


def test_the_same_bits(two, cli, cli_json):
    paths = two[2]()
    code, out, _ = cli("diff", *paths)
    assert code == 0
    assert out.splitlines()[-1] == "same"
    code, compared = cli_json("diff", *paths)
    assert code == 0
    assert compared["same"] is True
    assert compared["num_tensors"] == len(read_metadata(paths[0] / "actor").state_dict_metadata)


def test_one_element(two, cli, cli_json):
    a, b, save_both = two
    b["model"]["layer.weight"][3, 4] += 0.5
    b["model"]["mask"][2] ^= True
    paths = save_both()
    code, compared = cli_json("diff", *paths)
    assert code == 1
    assert compared["same"] is False
    weight, mask = compared["tensors"]
    moved = (a["model"]["layer.weight"].double() - b["model"]["layer.weight"].double()).abs().max().item()
    assert weight == {
        "name": "model.layer.weight", "form": "float32 [16, 8]", "num_elements": 128, "num_different": 1,
        "largest_difference": moved,
    }  # fmt: skip
    assert mask == {
        "name": "model.mask", "form": "bool [7]", "num_elements": 7, "num_different": 1, "largest_difference": None,
    }  # fmt: skip
    out = cli("diff", *paths)[1]
    assert "  model.layer.weight float32 [16, 8]: 1 of 128 elements, largest difference 0.5\n" in out
    assert out.splitlines()[-1] == "different"


@pytest.mark.parametrize(
    ("one", "other", "num_different", "largest"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], 0, None),
        ([0.0, 1.0], [-0.0, 1.0], 1, 0.0),
        ([math.nan, 1.0], [2.0, 1.0], 1, None),
        ([math.nan, 1.0], [2.0, 4.0], 2, 3.0),
        ([math.inf, 1.0], [math.inf, 1.0], 0, None),
        ([math.inf, 1.0], [2.0, 1.0], 1, "inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_and_not_values_are_compared(two, cli_json, one, other, num_different, largest, dtype):
    a, b, save_both = two
    a["model"]["x"], b["model"]["x"] = torch.tensor(one, dtype=dtype), torch.tensor(other, dtype=dtype)
    code, compared = cli_json("diff", *save_both())
    found = [(entry["num_different"], entry["largest_difference"]) for entry in compared["tensors"]]
    assert found == ([(num_different, largest)] if num_different else [])
    assert code == min(num_different, 1)


def test_nans_with_other_bits_differ(two, cli_json):
    a, b, save_both = two
    a["model"]["x"] = torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    b["model"]["x"] = torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32)
    code, compared = cli_json("diff", *save_both())
    assert code == 1
    assert compared["tensors"][0]["num_different"] == 1


def test_other_names_and_forms(two, cli_json):
    a, b, save_both = two
    a["model"]["only_a"] = torch.zeros(2)
    b["optim"]["only_b"] = torch.zeros(3, dtype=torch.int64)
    a["model"]["t"], b["model"]["t"] = torch.zeros(4), torch.zeros(2, 2)
    a["model"]["u"], b["model"]["u"] = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    code, compared = cli_json("diff", *save_both())
    assert code == 1
    assert compared["tensors"] == []
    assert compared["forms"] == [
        {"name": "model.only_a", "a": "float32 [2]", "b": None},
        {"name": "model.t", "a": "float32 [4]", "b": "float32 [2, 2]"},
        {"name": "model.u", "a": "float32 [4]", "b": "bfloat16 [4]"},
        {"name": "optim.only_b", "a": None, "b": "int64 [3]"},
    ]


def test_values_of_data_and_manifest(two, cli, cli_json):
    nan, other = {"w": torch.arange(4), "nan": math.nan}, {"w": torch.tensor([0, 1, 2, 4]), "nan": math.nan}
    paths = two[2](
        data_a={"progress": {"cursor": 5, "l": [1, 2.0]}, "k": 1, "zero": 0.0, **nan},
        data_b={"progress": {"cursor": 6, "l": [1, 2]}, "j": (1,), "zero": -0.0, **other},
        info_a={"identity": {"lr": 0.1, "seed": 1}},
        info_b={"identity": {"lr": 0.2, "seed": 1}},
    )
    code, compared = cli_json("diff", *paths)
    assert code == 1
    assert compared["same_tensors"] is True
    assert {entry["name"]: (entry["a"], entry["b"]) for entry in compared["data"]} == {
        "progress.cursor": ("5", "6"),
        "progress.l.1": ("2.0", "2"),
        "k": ("1", None),
        "j": (None, "(1,)"),
        "zero": ("0.0", "-0.0"),
        "w": ("tensor int64 [4]", "tensor int64 [4] (1 of 4 elements differ)"),
    }
    assert compared["manifest"] == [{"name": "info.identity.lr", "a": "0.1", "b": "0.2"}]
    out = cli("diff", *paths)[1]
    assert "  k: A 1, B missing" in out
    assert out.splitlines()[-1] == "different (all tensors are bitwise identical)"
    assert cli("diff", *paths, "--tensors-only")[0] == 0


@pytest.mark.parametrize("batch_bytes", [0, 1, 600, 10**9])
def test_batches_change_nothing(two, batch_bytes):
    _, b, save_both = two
    b["model"]["layer.weight"][0, 0] = 9.0
    b["optim"]["counts"][1] += 1
    path_a, path_b = save_both()
    compared = compare.compare(path_a, path_b, batch_bytes=batch_bytes)
    assert [found.name for found in compared.tensors] == ["model.layer.weight", "optim.counts"]
    assert compared.tensors[1].largest_difference == 1.0


def test_batches_are_bounded():
    sizes = {"a": 3, "b": 3, "c": 4, "d": 11, "e": 1, "f": 10}
    assert list(compare.batches(sizes, 10)) == [{"a", "b", "c"}, {"d"}, {"e"}, {"f"}]


def test_pickled_objects_are_not_opened_and_not_called_the_same(two, cli_json):
    paths = two[2]()
    for path in paths:
        metadata = read_metadata(path / "actor")
        metadata.state_dict_metadata["model.mask"] = BytesStorageMetadata()
        (path / "actor" / ".metadata").write_bytes(pickle.dumps(metadata))
    code, compared = cli_json("diff", *paths)
    assert code == 1
    text = "a pickled object, which is not opened"
    assert compared["forms"] == [{"name": "model.mask", "a": text, "b": text}]


def test_one_large_tensor_is_looked_at_in_slices(monkeypatch):
    monkeypatch.setattr(compare, "_SLICE", 7)
    a = torch.arange(100.0)
    b = a.clone()
    b[6], b[7], b[99] = 7.0, 17.0, math.nan
    found = compare.tensor_difference("x", a, b)
    assert (found.num_different, found.largest_difference) == (3, 10.0)
    assert compare.tensor_difference("x", a, a.clone()) is None


def test_diff_of_what_cannot_be_read(two, tmp_path, cli):
    path_a, path_b = two[2]()
    assert cli("diff", path_a, tmp_path)[0] == 2
    shutil.rmtree(path_b / "actor")
    code, _, error = cli("diff", path_a, path_b)
    assert code == 2
    assert str(path_b) in error


# rm and pin


# elsewhere


def test_everything_over_a_url(make_state, tmp_path, cli, cli_json):
    url = f"memory://cli{tmp_path}"
    root = storage.storage_path(url)
    for step in (10, 20, 30):
        save_as(root, step, make_state(step), metrics={"reward": step / 100})
    (root / "global_step_40" / "actor").mkdir(parents=True)
    (root / "global_step_40" / "actor" / "__0_0.distcp").write_bytes(b"half")
    code, found = cli_json("ls", url)
    assert (code, [entry["state"] for entry in found]) == (0, ["no manifest"] + ["committed"] * 3)
    assert found[1]["path"] == f"{url}/global_step_30"
    assert "reward 0.3" in cli("ls", f"{url}/")[1]
    assert "model parameters: 150" in cli("show", f"{url}/global_step_10")[1]
    assert cli("verify", url)[0] == 0
    assert cli("diff", f"{url}/global_step_10", f"{url}/global_step_10")[0] == 0
    assert cli("diff", f"{url}/global_step_10", f"{url}/global_step_20")[0] == 1
    assert cli("pin", f"{url}/global_step_10")[0] == 0
    assert "is pinned" in cli("rm", f"{url}/global_step_10")[2]
    assert cli("rm", f"{url}/global_step_20")[0] == 0
    assert cli("rm", f"{url}/global_step_40", "--force")[0] == 0
    flip(root / "global_step_10" / "data" / "data.pt")
    assert cli("verify", url)[0] == 1
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["global_step_10", "global_step_30"]


def test_an_unknown_url_is_one_line(cli):
    code, _, error = cli("ls", "nosuch://bucket/run")
    assert code == 2
    assert "nosuch" in error


def test_as_a_program(save, root, cli_json, run_forked):
    path = save(5, metrics={"reward": 1.0})
    code, listed = cli_json("ls", f"local://{root}")
    assert (code, [entry["step"] for entry in listed]) == (0, [5])
    flip(path / "actor" / "__0_0.distcp")
    program = (
        f"sys.argv[1:] = ['verify', {str(path)!r}]; runpy.run_module('rlinf_lite.checkpoint', run_name='__main__')"
    )
    verified = run_forked("-c", f"import runpy, sys; {program}")
    assert (verified.returncode, verified.stderr) == (1, "")
    assert verified.stdout.startswith("BAD")
