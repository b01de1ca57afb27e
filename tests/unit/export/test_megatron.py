"""Megatron's layout to and from Hugging Face directories, plain state dicts and DCP shards."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, manifest, read_data
from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights

TOOLS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"
LAYOUT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("megatron_layout.py"))))
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 21}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def convert(tool):
    """``convert("megatron_to_hf", flag=value ...)``: exit code and output."""
    return lambda name, **flags: tool(TOOLS / f"convert_{name}.py")(**flags)


@pytest.fixture
def make(make_model):
    return lambda family="qwen2", tied=False, seed=0: make_model(family, tied, seed, **SIZES)


def tensors_of(model):
    return {name: tensor.detach().clone() for name, tensor in named_weights(model)}


def moments_of(model):
    generator = torch.Generator().manual_seed(5)
    return [{name: torch.rand(t.shape, generator=generator) for name, t in tensors_of(model).items()} for _ in range(2)]


@pytest.fixture
def written(tmp_path):
    """Write a model as Megatron-LM does; returns the directory and the moments."""

    def write(model, *, size=2, step=50, where="megatron", **options):
        moments = moments_of(model)
        LAYOUT.write(tmp_path / where, model.config, tensors_of(model), moments, size=size, step=step, **options)
        return tmp_path / where, moments

    return write


FLAVOURS = {
    "0.13": {"version": "0.13"},
    "0.16 bf16": {"dtype": torch.bfloat16},
    "0.19 te": {"version": "0.19", "spec": "te"},
    "te bf16, one rank": {"spec": "te", "dtype": torch.bfloat16, "size": 1},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_what_megatron_wrote_becomes_a_hugging_face_model(
    convert, make, written, base_of, assert_same_model, tmp_path, flavour, family, tied
):
    model, options = make(family, tied), FLAVOURS[flavour]
    directory, _ = written(model, **options)
    dtype = options.get("dtype", torch.float32)
    base = base_of(model)
    code, printed = convert("megatron_to_hf", megatron_path=directory, base_model=base, output_path=tmp_path / "out")
    assert code == 0, printed
    assert_same_model(tmp_path / "out", model, dtype)
    exact = tmp_path / "exact"
    assert convert("megatron_to_hf", megatron_path=directory, base_model=base, output_path=exact, dtype="fp32")[0] == 0
    assert_same_model(exact, make(family, tied))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("llama", True)])
def test_hugging_face_to_megatron_and_back(convert, make, base_of, assert_same_model, tmp_path, size, family, tied):
    model = make(family, tied)
    source = tmp_path / "model"
    base_of(model, "model")
    model.save_pretrained(source)
    code, printed = convert(
        "hf_to_megatron", hf_path=source, output_path=tmp_path / "checkpoints", tensor_parallel=size
    )
    assert code == 0, printed
    checkpoint = tmp_path / "checkpoints/global_step_0"
    assert (checkpoint / "actor/latest_checkpointed_iteration.txt").read_text() == "release"
    for rank in range(size):
        held = torch.load(checkpoint / f"actor/release/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
        assert held["args"].padded_vocab_size == 128 * size
        expected = LAYOUT.rank_tensors(model.config, tensors_of(model), size, rank, padded=128 * size)
        assert list(held["model"]) == [name for name, _ in expected]
        assert all(torch.equal(held["model"][name], tensor) for name, tensor in expected)
    assert convert("megatron_to_hf", megatron_path=checkpoint, output_path=tmp_path / "back")[0] == 0
    assert_same_model(tmp_path / "back", model)


def test_a_plain_state_dict_loads_strictly(convert, make, written, base_of, tmp_path):
    model = make(tied=True)
    directory, _ = written(model)
    file = tmp_path / "out.pt"
    code, printed = convert(
        "megatron_to_state_dict", megatron_path=directory, base_model=base_of(model), output_path=file
    )
    assert code == 0, printed
    other = make(tied=True, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(torch.equal(tensor, tensors_of(model)[name]) for name, tensor in named_weights(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_shards_and_back_with_the_optimizer(convert, make, written, base_of, tmp_path, dtype):
    """TP 2 -> shards -> TP 1 -> shards -> TP 2: every number equal, by a reader of its own."""
    model = make()
    directory, moments = written(model, dtype=dtype)
    base, size, path = base_of(model), 2, directory
    wanted = [LAYOUT.read(directory, 2)[rank] for rank in range(2)]
    for number, size in enumerate((1, 2)):
        shards, back = tmp_path / f"shards{number}", tmp_path / f"back{number}"
        code, printed = convert(
            "megatron_to_dcp", megatron_path=path, base_model=base, output_path=shards, dtype="fp32"
        )
        assert code == 0, printed
        held = read_tensors(shards / "global_step_50/actor")
        for name, tensor in tensors_of(model).items():
            assert torch.equal(held[f"model.{name}"], tensor)
            assert torch.equal(held[f"optim.{name}.exp_avg"], moments[0][name])
            assert torch.equal(held[f"optim.{name}.exp_avg_sq"], moments[1][name])
            assert held[f"optim.{name}.step"] == 50
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        code, printed = convert(
            "dcp_to_megatron", dcp_path=shards / "global_step_50", output_path=back, tensor_parallel=size, dtype=kind
        )
        assert code == 0, printed
        path = back / "global_step_50"
    for rank, (content, kind, buffer) in enumerate(LAYOUT.read(path / "actor", 2)):
        theirs, their_kind, their_buffer = wanted[rank]
        assert kind == their_kind == dtype and content["iteration"] == 50
        for name, tensor in theirs["model"].items():
            if isinstance(tensor, torch.Tensor) and "word_emb" not in name and "output" not in name:
                assert torch.equal(content["model"][name], tensor), name
        # Padded to 128 rows per rank instead of 8: the slots of the vocabulary are larger, the others move.
        assert buffer["numel_unpadded"] > their_buffer["numel_unpadded"]
        parts = [LAYOUT.rank_tensors(model.config, t, 2, rank, padded=256) for t in (tensors_of(model), *moments)]
        for key, named in zip(("param", "exp_avg", "exp_avg_sq"), parts, strict=True):
            assert torch.equal(buffer[key], LAYOUT.flat(named)), key


def test_counters_and_config_are_kept_and_the_missing_rng_state_is_recorded(convert, make, base_of, tmp_path):
    model = make()
    tensors = tensors_of(model)
    adam = {n: {"step": torch.tensor(3.0), "exp_avg": t, "exp_avg_sq": t * t} for n, t in tensors.items()}
    state = {"model": tensors, "optim": adam, "lr_scheduler": {"num_updates": torch.tensor(4)}}
    info = {"tied": tied_names(model), "identity": {"actor.optim.lr": 0.5}, "model_path": str(base_of(model))}
    data = {"progress": {"step": 7, "cursor": 99}}
    path = Checkpointer(tmp_path / "a").save(7, state, data=data, info=info).path
    assert convert("dcp_to_megatron", dcp_path=path, output_path=tmp_path / "b")[0] == 0
    middle = tmp_path / "b/global_step_7"
    ((content, *_),) = LAYOUT.read(middle / "actor", 1)
    assert {group["lr"] for group in content["optimizer"]["optimizer"]["param_groups"]} == {0.5}
    assert convert("megatron_to_dcp", megatron_path=middle, output_path=tmp_path / "c")[0] == 0
    last = tmp_path / "c/global_step_7"
    assert read_data(last) == data
    assert manifest.read(last).info == {**info, "lacks_rng": True}
    held = {name: tensor for name, tensor in read_tensors(last / "actor").items() if not name.startswith("rng.")}
    for name, tensor in read_tensors(path / "actor").items():
        assert name.startswith("rng.") or torch.equal(held.pop(name), tensor), name
    assert not held
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}}
    state = {**loaded, "optim": adam, "lr_scheduler": state["lr_scheduler"]}
    assert not Checkpointer(tmp_path / "c").load(last, state).rng_restored


@pytest.mark.parametrize(
    "given", ["run/global_step_50", "run/global_step_50/actor", "run/global_step_50/actor/iter_0000050"]
)
def test_a_checkpoint_is_found_from_any_of_its_directories(convert, make, written, base_of, tmp_path, given):
    model = make()
    written(model, where="run/global_step_50/actor")
    out = tmp_path / "out.pt"
    code, printed = convert(
        "megatron_to_state_dict", megatron_path=tmp_path / given, base_model=base_of(model), output_path=out
    )
    assert code == 0, printed


def test_the_tracker_chooses_and_a_path_overrules_it(convert, make, written, base_of, tmp_path):
    old, new = make(seed=1), make(seed=2)
    directory, _ = written(new, step=60)
    written(old, step=50)  # the tracker now says 50
    for path, model in ((directory, old), (directory / "iter_0000060", new)):
        out = tmp_path / f"{path.name}.pt"
        assert convert("megatron_to_state_dict", megatron_path=path, base_model=base_of(model), output_path=out)[0] == 0
        held = torch.load(out, weights_only=True)
        assert all(torch.equal(held[name], tensor) for name, tensor in tensors_of(model).items())
    (directory / "latest_checkpointed_iteration.txt").write_text("70")
    code, printed = convert(
        "megatron_to_state_dict", megatron_path=directory, base_model=tmp_path / "base", output_path=tmp_path / "x.pt"
    )
    assert code == 2 and "holds iter_0000050, iter_0000060, but not iter_0000070" in printed


def test_refusals(convert, make, written, base_of, assert_refused, tmp_path):
    model = make()
    directory, _ = written(model)
    base, out = base_of(model), tmp_path / "out"
    flags = {"megatron_path": directory, "output_path": out}
    assert_refused(convert("megatron_to_hf", **flags), "--base_model is needed")
    assert_refused(convert("megatron_to_hf", **{**flags, "megatron_path": tmp_path / "none"}), "no such directory")
    assert_refused(convert("megatron_to_hf", **{**flags, "megatron_path": base}), "is a Hugging Face directory")
    other = base_of(make("llama"), "llama")
    assert_refused(convert("megatron_to_hf", **flags, base_model=other), "linear_qkv.bias")
    shards = Checkpointer(tmp_path / "dcp").save(3, {"model": tensors_of(model)}).path
    assert_refused(convert("megatron_to_hf", megatron_path=shards, output_path=out), "holds DCP shards", "--dcp_path")
    assert_refused(
        convert("hf_to_megatron", hf_path=base, output_path=tmp_path / "c", tensor_parallel=4), "--tensor_parallel 4"
    )
    assert not out.exists()


def test_a_mixture_of_experts_and_a_pipeline_are_refused_by_name(
    convert, make, written, base_of, assert_refused, tmp_path
):
    model = make()
    directory, _ = written(model)
    flags = {"megatron_path": directory, "base_model": base_of(model), "output_path": tmp_path / "out"}
    file = directory / "iter_0000050/mp_rank_00/distrib_optim.pt"
    torch.save([torch.load(file), torch.load(file)], file)
    assert_refused(convert("megatron_to_dcp", **flags), "distrib_optim.pt", "mixture of experts")
    stage = directory / "iter_0000050/mp_rank_00_001"
    (directory / "iter_0000050/mp_rank_00").rename(stage)
    assert_refused(convert("megatron_to_hf", **flags), "mp_rank_00_001", "pipeline")


def test_a_file_that_would_run_code_is_refused(convert, make, written, base_of, assert_refused, tmp_path):
    model = make()
    directory, _ = written(model)
    file = directory / "iter_0000050/mp_rank_01/model_optim_rng.pt"
    torch.save({**torch.load(file, weights_only=False), "args": Path}, file)
    content = torch.load(file, weights_only=False)
    torch.save({**content, "args": print}, file)
    flags = {"megatron_path": directory, "base_model": base_of(model), "output_path": tmp_path / "out"}
    assert_refused(convert("megatron_to_hf", **flags), str(file), "print, which no checkpoint needs")
