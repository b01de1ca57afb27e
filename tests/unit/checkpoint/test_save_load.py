"""One process saves and loads bit-exactly; a state that does not fit is refused with the names that differ."""

import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from rlinf_lite.checkpoint import Checkpointer, StateMismatch, flatten, layout, manifest, read_data, select
from rlinf_lite.checkpoint.formats.read_state import read_tensors, tensor_names


class Scale:
    """A piece of state that gives and takes itself as tensors, as a gradient scaler does."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": torch.tensor(self.value, dtype=torch.float64)}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"].item()


def assert_equal(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def load(root):
    return lambda path, state, **options: Checkpointer(root, seed=7).load(path, state, **options)


def test_every_form_of_tensor_comes_back(save, load, make_state):
    path, state = save(5), make_state(6)
    report = load(path, state)
    assert_equal(state, make_state(5))
    assert report.manifest.step == 5
    assert report.rng_restored


def test_tensors_are_filled_where_they_are(save, load, make_state):
    path, state = save(5), make_state(6)
    before = {name: tensor.data_ptr() for name, tensor in flatten(state).items()}
    load(path, state)
    assert {name: tensor.data_ptr() for name, tensor in flatten(state).items()} == before


def test_a_report_says_what_was_written(root, make_state):
    report = Checkpointer(root, seed=7).save(5, make_state(5), data={}, info={})
    assert report.path == layout.step_dir(root, 5)
    assert report.superseded is None
    on_disk = sum(file.stat().st_size for file in report.path.rglob("*") if file.is_file())
    assert report.num_bytes == on_disk - (report.path / "manifest.json").stat().st_size


def test_nothing_is_left_beside_a_checkpoint(save, root):
    save(5)
    assert [path.name for path in root.iterdir()] == ["global_step_5"]


def test_stateful_objects_give_and_take_at_any_depth(root, load):
    Checkpointer(root, seed=7).save(1, {"scale": Scale(2.5), "deep": {"scale": Scale(0.1)}}, data={}, info={})
    state = {"scale": Scale(0.0), "deep": {"scale": Scale(0.0)}}
    load(root / "global_step_1", state)
    assert (state["scale"].value, state["deep"]["scale"].value) == (2.5, 0.1)


def test_parameters_that_need_gradients_and_views_come_back(root, load):
    base = torch.randn(8, 8)
    state = {"p": torch.nn.Parameter(torch.randn(4, 4)), "column": base[:, 3], "transposed": base.t()}
    Checkpointer(root, seed=7).save(1, state, data={}, info={})
    empty = {"p": torch.nn.Parameter(torch.zeros(4, 4)), "column": torch.zeros(8), "transposed": torch.zeros(8, 8)}
    load(root / "global_step_1", empty)
    assert_equal(empty, state)
    assert empty["p"].requires_grad


def test_special_values_keep_their_bits(root, load):
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    Checkpointer(root, seed=7).save(1, {"x": bits.view(torch.float32)}, data={}, info={})
    state = {"x": torch.zeros(4)}
    load(root / "global_step_1", state)
    assert torch.equal(state["x"].view(torch.int32), bits)


def test_generators_come_back_and_saving_draws_nothing(save, load, make_state):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = make_state(5)
    path = save(5)
    expected = random.gauss(0, 1), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(()).item()) == expected
    load(path, state)
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(()).item()) == expected


def test_a_state_without_tensors_has_generators_alone(root, load):
    Checkpointer(root, seed=7).save(1, {"optim": {}}, data={}, info={})
    assert load(root / "global_step_1", {"optim": {}}).rng_restored


def test_the_directory_can_be_read_without_its_model(save, make_state):
    actor = save(5) / "actor"
    expected = flatten(make_state(5))
    assert [name for name in tensor_names(actor) if not name.startswith("rng.")] == sorted(expected)
    assert_equal(read_tensors(actor, lambda name: not name.startswith("rng.")), expected)
    assert list(read_tensors(actor, lambda name: name == "model.empty")) == ["model.empty"]
    assert read_tensors(actor, lambda name: False) == {}


def test_data_comes_back(root, make_state):
    data = {"progress": {"step": 3, "best": float("inf"), "ids": [1, "a", None, True, (1, 2)]}, "t": torch.arange(3)}
    path = Checkpointer(root, seed=7).save(3, make_state(3), data=data, info={}).path
    read = read_data(path)
    assert read["progress"] == data["progress"]
    assert torch.equal(read["t"], data["t"])


@pytest.mark.parametrize("value", [np.float64(0.5), object, manifest.FileRecord(size=1, digest="")], ids=str)
def test_data_that_could_never_be_read_back_is_not_saved(save, root, make_state, value):
    save(4)
    with pytest.raises(TypeError, match=r"data/data\.pt takes plain values and tensors only"):
        Checkpointer(root, seed=7).save(5, make_state(5), data={"best": value}, info={})
    assert [path.name for path in root.iterdir()] == ["global_step_4"]


def test_info_that_is_no_json_is_not_saved(save, root, make_state):
    save(4)
    with pytest.raises(TypeError, match="JSON"):
        Checkpointer(root, seed=7).save(5, make_state(5), data={}, info={"dtype": torch.float32})
    assert [path.name for path in root.iterdir()] == ["global_step_4"]


def test_a_value_that_is_no_tensor_is_not_saved(root):
    with pytest.raises(TypeError, match=r"state optim\.lr is a float"):
        Checkpointer(root, seed=7).save(5, {"optim": {"lr": 0.1}}, data={}, info={})
    assert not root.exists()


def test_missing_and_extra_keys_are_listed(save, load, make_state):
    path, state = save(5), make_state(6)
    state["model"]["new.weight"] = state["model"].pop("layer.weight")
    with pytest.raises(
        StateMismatch, match=r"missing: model\.new\.weight; not asked for: model\.layer\.weight"
    ) as caught:
        load(path, state)
    assert str(path) in str(caught.value)


def test_many_mismatches_are_counted(save, load, make_state):
    path, state = save(5), make_state(6)
    state["model"] |= {f"more.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(StateMismatch, match=r"missing: model\.more\.0, .* and 4 more"):
        load(path, state)


def test_another_shape_is_named_with_both(save, load, make_state):
    path, state = save(5), make_state(6)
    state["model"]["layer.weight"] = torch.zeros(8, 16)
    with pytest.raises(
        StateMismatch, match=r"model\.layer\.weight is float32 \[16, 8\], the model's is float32 \[8, 16\]"
    ):
        load(path, state)


def test_another_type_is_not_rounded_in_silence(save, load, make_state):
    path, state = save(5), make_state(6)
    state["model"]["layer.weight"] = state["model"]["layer.weight"].bfloat16()
    with pytest.raises(StateMismatch, match="the model's is bfloat16"):
        load(path, state)


def test_a_mismatch_leaves_the_state_as_it_was(save, load, make_state):
    path, state = save(5), make_state(6)
    state["model"]["more"] = torch.zeros(2)
    with pytest.raises(StateMismatch):
        load(path, state)
    del state["model"]["more"]
    assert_equal(state, make_state(6))


def test_saving_a_step_again_keeps_the_older_content(root, save, make_state):
    first = save(5)
    before = {file.relative_to(first): file.read_bytes() for file in first.rglob("*") if file.is_file()}
    report = Checkpointer(root, seed=7).save(5, make_state(50), data={}, info={})
    assert report.path == first
    aside = report.superseded
    assert {file.relative_to(aside): file.read_bytes() for file in aside.rglob("*") if file.is_file()} == before
    assert select("auto", root, verify="full").path == first
    state = make_state(0)
    Checkpointer(root, seed=7).load(first, state)
    assert_equal(state, make_state(50))


def test_two_saves_of_one_state_hold_the_same_bytes(root, make_state):
    """`.metadata` names its directory and a random id; everything else is the state and nothing but the state."""
    torch.manual_seed(0)
    checkpointer = Checkpointer(root, seed=7)
    records = []
    for step in (1, 2):
        path = checkpointer.save(step, make_state(1), data={"step": 1}, info={}).path
        records.append(manifest.read(path).files)
    del records[0]["actor/.metadata"], records[1]["actor/.metadata"]
    assert records[0] == records[1]


def test_the_metadata_is_what_stock_tools_expect(save):
    metadata = dcp.FileSystemReader(save(5) / "actor").read_metadata()
    assert metadata.planner_data["optim.layer.weight.step"] == ("optim", "layer.weight", "step")
