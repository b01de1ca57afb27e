"""Checkpoints to Hugging Face directories and back: bitwise identical, with one tensor in memory at a time."""

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.read_state import read_tensors, tensor_names
from rlinf_lite.export.safetensors_file import Spec, parse_size, write
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.names import named_weights, weight_shapes

TOOLS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"
TO_HF, TO_DCP = TOOLS / "convert_dcp_to_hf.py", TOOLS / "convert_hf_to_dcp.py"
EMBEDDED = "embedded:tiny-arithmetic"
INPUT_IDS = torch.tensor([[1, 5, 3, 2]])
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
GPT2_SIZES = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS = {
    "llama": lambda tied: LlamaConfig(**SIZES, tie_word_embeddings=tied),
    "qwen2": lambda tied: Qwen2Config(**SIZES, tie_word_embeddings=tied),
    "qwen3": lambda tied: Qwen3Config(**SIZES, tie_word_embeddings=tied),
    "gemma": lambda tied: GemmaConfig(**SIZES, tie_word_embeddings=tied),
    "gpt2": lambda tied: GPT2Config(**GPT2_SIZES, tie_word_embeddings=tied),
}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def make_model():
    def make(family="llama", tied=True, seed=0, **changes):
        config = CONFIGS[family](tied)
        config.update(changes)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for param in model.parameters():  # biases and norms too, which begin alike in all models
            torch.nn.init.normal_(param, std=0.1)
        return model

    return make


@pytest.fixture
def base_of(tmp_path):
    """The directory that a model was trained from: the same architecture, other weights, a tokenizer."""

    def save(model, name="base"):
        directory = tmp_path / name
        torch.manual_seed(99)
        AutoModelForCausalLM.from_config(model.config).save_pretrained(directory)
        for file in resolve(EMBEDDED).glob("tokenizer*"):
            shutil.copyfile(file, directory / file.name)
        return directory

    return save


@pytest.fixture
def checkpoint_of(tmp_path):
    """Save a model as the trainer does."""

    def save(model, step=5, **info):
        tensors = dict(named_weights(model))
        moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in model.named_parameters()}
        state = {"model": tensors, "optim": moments, "lr_scheduler": {"num_updates": torch.tensor(1)}}
        info = {"tied": tied_names(model), **info}
        return Checkpointer(tmp_path / "checkpoints").save(step, state, info=info).path

    return save


@pytest.fixture
def tool(capsys):
    """``tool(script)(flag=value, ...)``: exit code and output."""

    def load(script):
        main = runpy.run_path(str(script))["main"]

        def run(**flags):
            capsys.readouterr()  # what transformers printed while the test made its models
            code = main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
            out, err = capsys.readouterr()
            return code, err if code else out

        return run

    return load


@pytest.fixture
def to_hf(tool):
    return tool(TO_HF)


@pytest.fixture
def to_dcp(tool):
    return tool(TO_DCP)


def assert_refused(answer, *texts):
    """One line, exit code 2."""
    code, said = answer
    assert code == 2
    assert said.count("\n") == 1
    for text in ("error: ", *texts):
        assert text in said


def assert_same_model(directory, model, dtype=torch.float32):
    """The directory loads without a warning, and is bitwise identical to ``model`` as ``dtype``."""
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    expected = model.to(dtype) if dtype != torch.float32 else model
    theirs, ours = dict(named_weights(loaded)), dict(named_weights(expected))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert tied_names(loaded) == tied_names(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, expected(INPUT_IDS).logits)


def stored(directory):
    """All tensors in a directory's safetensors files."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_architecture_there_and_back(family, tied, make_model, base_of, checkpoint_of, to_hf, to_dcp, tmp_path):
    model = make_model(family, tied)
    out = tmp_path / "out"
    code, said = to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))
    assert code == 0, said
    assert str(out) in said
    assert_same_model(out, model)
    assert ("lm_head.weight" in stored(out)) != tied

    code, said = to_dcp(hf_path=out, output_path=tmp_path / "weights")
    assert code == 0, said
    actor = tmp_path / "weights" / "global_step_0" / "actor"
    held = read_tensors(actor, lambda name: name.startswith("model."))
    assert held.keys() == {f"model.{name}" for name, _ in named_weights(model)}
    assert all(torch.equal(held[f"model.{name}"], tensor) for name, tensor in named_weights(model))

    code, said = to_hf(dcp_path=actor.parent, output_path=tmp_path / "again")  # it knows the directory it came from
    assert code == 0, said
    assert_same_model(tmp_path / "again", model)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_embedded_model_named_by_the_checkpoint(checkpoint_of, to_hf, tmp_path):
    embedded = resolve(EMBEDDED)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(embedded), dtype=torch.float32).eval()
    out = tmp_path / "new" / "out"
    assert to_hf(dcp_path=checkpoint_of(model, model_path=EMBEDDED), output_path=out)[0] == 0
    assert_same_model(out, model)
    text = "57+38="
    ours, theirs = (AutoTokenizer.from_pretrained(directory, local_files_only=True) for directory in (out, embedded))
    assert ours(text).input_ids == theirs(text).input_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in embedded.iterdir())


def test_the_files_beside_the_weights(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    base = base_of(model)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"], config["quantization_config"] = "float16", {"quant_method": "fp8"}
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("model.safetensors.index.json", "adapter_config.json", "pytorch_model.bin", ".hidden.json"):
        (base / name).write_text("{}")
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base, dtype="bf16")[0] == 0
    written = json.loads((out / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in written
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert sorted(file.name for file in out.iterdir()) == [
        "additional_chat_templates", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert_same_model(out, model, torch.bfloat16)


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_type(flag, dtype, make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model("gemma"), tmp_path / "out"
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model), dtype=flag)[0] == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in stored(out).values()} == {dtype}
    assert_same_model(out, model, dtype)


def test_the_type_is_kept_unless_told_otherwise(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model().bfloat16(), tmp_path / "out"
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))[0] == 0
    assert_same_model(out, model, torch.bfloat16)


def test_a_value_too_large_for_the_type(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    answer = to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model), dtype="fp16")
    assert_refused(answer, "model.norm.weight", "too large", "--dtype")
    assert not list(tmp_path.glob("out*"))


def test_several_files(make_model, base_of, checkpoint_of, to_hf, to_dcp, tmp_path):
    model, out = make_model(tied=False), tmp_path / "out"
    base, path = base_of(model), checkpoint_of(model)
    assert to_hf(dcp_path=path, output_path=out, base_model=base, max_shard_size="4KB")[0] == 0
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 4000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert_same_model(out, model)

    assert to_dcp(hf_path=out, output_path=tmp_path / "weights")[0] == 0
    actor = tmp_path / "weights" / "global_step_0" / "actor"
    assert all(
        torch.equal(tensor, dict(named_weights(model))[name.removeprefix("model.")])
        for name, tensor in read_tensors(actor, lambda name: name.startswith("model.")).items()
    )


def test_a_tensor_larger_than_a_file_has_one_for_itself(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    flags = {"dcp_path": checkpoint_of(model), "base_model": base_of(model)}
    assert to_hf(output_path=out, max_shard_size=1, **flags)[0] == 0
    assert len(list(out.glob("*.safetensors"))) == len(list(named_weights(model)))
    assert_same_model(out, model)


def test_types_of_all_widths_are_aligned(tmp_path):
    """The safetensors package reads what was written."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3, 5).bfloat16(),
        "wide": torch.randint(0, 2**40, (3,)),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 3).t(),
        "naïve": torch.randn(2).half(),
    }
    specs = {name: Spec(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}
    with (tmp_path / "x.safetensors").open("wb") as stream:
        write(stream, specs, tensors.__getitem__)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    with pytest.raises(TypeError, match=r"odd is torch\.complex64"), (tmp_path / "y").open("wb") as stream:
        write(stream, {"odd": Spec(dtype=torch.complex64, shape=(1,))}, tensors.__getitem__)


def test_modes_follow_the_umask(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    flags = {"dcp_path": checkpoint_of(model), "base_model": base_of(model)}
    before = os.umask(0o027)
    try:
        assert to_hf(output_path=out, **flags)[0] == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["bare", "section", "rlinf"])
def test_directories_of_other_projects(form, tied, make_model, base_of, to_hf, tmp_path):
    """As `get_model_state_dict` returns a model, alone or below a key; tied weights are there under both names."""
    model, out = make_model(tied=tied), tmp_path / "out"
    state = get_model_state_dict(model)
    everything = {
        "bare": state,
        "section": {"model": state, "optim": {"lr": 0.1, "w": torch.ones(2)}, "epoch": 3},
        "rlinf": {"fsdp_checkpoint": {"model": state, "rng": {"python": (3, (1, 2), None)}}},
    }[form]
    dcp.save(everything, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, said = to_hf(dcp_path=tmp_path / "dcp", output_path=out, base_model=base_of(model))
    assert code == 0, said
    assert_same_model(out, model)


def test_an_empty_directory_is_filled(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))[0] == 0
    assert_same_model(out, model)


def test_an_existing_output_is_refused(make_model, checkpoint_of, to_hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    path = checkpoint_of(make_model(), model_path=EMBEDDED)
    assert_refused(to_hf(dcp_path=path, output_path=tmp_path / "out"), str(tmp_path / "out"), "not empty")
    assert_refused(to_hf(dcp_path=path, output_path=tmp_path / "file"), str(tmp_path / "file"), "there already")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_base_model_is_needed(make_model, checkpoint_of, to_hf, tmp_path):
    model, out = make_model(), tmp_path / "out"
    assert_refused(to_hf(dcp_path=checkpoint_of(model, 1), output_path=out), "--base_model is needed")
    gone = checkpoint_of(model, 2, model_path=str(tmp_path / "gone"))
    assert_refused(to_hf(dcp_path=gone, output_path=out), "manifest", str(tmp_path / "gone"), "--base_model")
    answer = to_hf(dcp_path=gone, output_path=out, base_model=tmp_path / "nowhere")
    assert_refused(answer, "--base_model=", "nowhere", "no config.json")


def test_another_tokenizer_than_the_run_had_is_noted(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model = make_model()
    path = checkpoint_of(model, identity={"actor.tokenizer (files)": "0" * 64})
    code, said = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base_of(model))
    assert code == 0
    assert "note: the tokenizer files are those of" in said


def damage(path):
    shard = path / "actor" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def test_a_damaged_checkpoint_is_refused(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    shard = damage(path)
    flags = {"dcp_path": path, "output_path": tmp_path / "out", "base_model": base}
    assert_refused(to_hf(**flags), str(shard), "sha256")
    assert not list(tmp_path.glob("out*"))
    with shard.open("ab") as stream:
        stream.write(b"more")
    assert_refused(to_hf(**flags, verify="size"), str(shard), "bytes, the manifest says")
    (path / "manifest.json").unlink()
    assert_refused(to_hf(**flags, verify="off"), "never committed")


def test_verification_can_be_skipped(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    (path / "data" / "more").write_text("not in the manifest")
    flags = {"dcp_path": path, "output_path": tmp_path / "out", "base_model": base}
    assert_refused(to_hf(**flags, verify="size"), "data/more is not in the manifest")
    assert to_hf(**flags, verify="off")[0] == 0
    assert_same_model(tmp_path / "out", model)


def test_another_model_is_refused_by_name(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    path = checkpoint_of(make_model())

    def against(name, **other):
        return to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base_of(make_model(**other), name))

    assert_refused(against("deeper", num_hidden_layers=3), "missing: model.layers.2.self_attn.q_proj.weight")
    assert_refused(against("shallower", num_hidden_layers=1), "not in the base model: model.layers.1.")
    shapes = "model.layers.0.mlp.up_proj.weight is [24, 16], the base model's is [32, 16]"
    assert_refused(against("wider", intermediate_size=32), shapes)
    assert_refused(against("gpt", family="gpt2"), "missing: transformer.wte.weight", "not in the base model: model.")
    assert_refused(against("untied", tied=False), "missing: lm_head.weight (tied to model.embed_tokens.weight in")
    assert not list(tmp_path.glob("out*"))


def test_a_base_that_ties_weights_that_the_checkpoint_does_not(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    path, base = checkpoint_of(make_model(tied=False)), base_of(make_model(tied=True))
    answer = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base)
    assert_refused(answer, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings: false")


def test_a_full_disk_leaves_nothing(make_model, base_of, checkpoint_of, to_hf, tmp_path, largest_file):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    with largest_file(4096):
        answer = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base)
    assert_refused(answer, "File too large", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("given", ["weights", "weights/global_step_0"])
def test_what_a_checkpoint_of_weights_holds(given, to_dcp, tmp_path):
    code, said = to_dcp(hf_path=EMBEDDED, output_path=tmp_path / given, dtype="bf16")
    path = tmp_path / "weights" / "global_step_0"
    assert code == 0, said
    assert str(path) in said
    manifest = manifests.read_verified(path, "full")
    assert (manifest.step, manifest.world_size) == (0, 1)
    assert manifest.info["model_path"] == EMBEDDED
    assert manifest.info["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    model = build_on_meta(AutoConfig.from_pretrained(resolve(EMBEDDED)), "fp32")
    names = [name for name in tensor_names(path / "actor") if not name.startswith("rng.")]
    assert names == sorted(f"model.{name}" for name, _ in named_weights(model))
    original = load_file(resolve(EMBEDDED) / "model.safetensors")
    held = read_tensors(path / "actor", lambda name: name.startswith("model."))
    assert all(torch.equal(held[f"model.{name}"], tensor.bfloat16()) for name, tensor in original.items())


def test_weights_are_loaded_as_a_model_only(make_model, to_dcp, tmp_path):
    model, other = make_model("qwen3", seed=1), make_model("qwen3", seed=2)
    model.save_pretrained(tmp_path / "hf")
    assert to_dcp(hf_path=tmp_path / "hf", output_path=tmp_path)[0] == 0
    state = {"model": {name: tensor.detach() for name, tensor in named_weights(other)}}
    Checkpointer(tmp_path / "new").load(tmp_path / "global_step_0", state, whole=False)
    with torch.no_grad():
        assert torch.equal(other(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_names_of_a_bare_base_model_and_of_a_tie(make_model, to_dcp, tmp_path):
    """GPT-2's own file has no ``transformer.``; some directories keep a tied tensor as ``lm_head.weight``."""
    model = make_model("gpt2")
    model.config.save_pretrained(tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): tensor.detach() for name, tensor in named_weights(model)}
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hf" / "model.safetensors")
    code, said = to_dcp(hf_path=tmp_path / "hf", output_path=tmp_path)
    assert code == 0, said
    assert "note: not in the model, so not written: h.0.attn.bias" in said
    held = read_tensors(tmp_path / "global_step_0" / "actor", lambda name: name.startswith("model."))
    assert held.keys() == {f"model.{name}" for name, _ in named_weights(model)}
    assert all(torch.equal(held[f"model.{name}"], tensor) for name, tensor in named_weights(model))


def test_invalid_model_directories_are_refused(make_model, to_dcp, tmp_path):
    assert_refused(to_dcp(hf_path=tmp_path / "nowhere", output_path=tmp_path / "out"), "--hf_path=", "nowhere")
    make_model().config.save_pretrained(tmp_path / "hf")
    flags = {"hf_path": tmp_path / "hf", "output_path": tmp_path / "out"}
    file = tmp_path / "hf" / "model.safetensors"
    assert_refused(to_dcp(**flags), "no *.safetensors there")
    file.write_bytes(b"no header")
    assert_refused(to_dcp(**flags), "model.safetensors", "copy the directory again")
    tensors = {name: tensor.detach().clone() for name, tensor in named_weights(make_model())}
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file)
    assert_refused(to_dcp(**flags), "its weights lack model.norm.weight")
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, file)
    assert_refused(to_dcp(**flags), "model.norm.weight is [3]", "wants [16]")
    save_file({**tensors, "lm_head.weight": torch.ones(20, 16)}, file)
    assert_refused(to_dcp(**flags), "lm_head.weight differs from model.embed_tokens.weight")
    save_file({**tensors, "model.norm.weight": torch.ones(16, dtype=torch.float8_e4m3fn)}, file)
    assert_refused(to_dcp(**flags), "model.norm.weight", "F8_E4M3 is not supported")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_refused(to_dcp, tmp_path):
    assert_refused(to_dcp(hf_path=EMBEDDED, output_path=tmp_path / "global_step_7"), "global_step_7", "global_step_0")
    assert to_dcp(hf_path=EMBEDDED, output_path=tmp_path)[0] == 0
    for given in (tmp_path, tmp_path / "global_step_0"):
        assert_refused(to_dcp(hf_path=EMBEDDED, output_path=given), str(tmp_path / "global_step_0"), "there already")


def test_checkpoints_behind_a_url(make_model, base_of, to_hf, to_dcp, tmp_path):
    model = make_model(tied=False)
    model.save_pretrained(tmp_path / "hf")
    root = f"memory://{tmp_path.name}"
    assert to_dcp(hf_path=tmp_path / "hf", output_path=root)[0] == 0
    assert_refused(to_dcp(hf_path=tmp_path / "hf", output_path=root), f"{root}/global_step_0", "there already")
    code, said = to_hf(dcp_path=f"{root}/global_step_0", output_path=tmp_path / "out", base_model=base_of(model))
    assert code == 0, said
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"dcp_path": "nosuch://x", "output_path": "out"}, "nosuch://x: "),
        ({"dcp_path": "x", "output_path": "out", "max_shard_size": "2 parsecs"}, "is not a size; write it as 2GB"),
        ({"dcp_path": "x", "output_path": "out", "dtype": "fp8"}, "fp32"),
    ],
)
def test_arguments_that_cannot_be_read(flags, text, to_hf, capsys):
    with pytest.raises(SystemExit) as caught:
        to_hf(**flags)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("size", ["2GB", "500mb", "1.5 KiB", "7"])
def test_sizes(size):
    assert parse_size(size) == {"2GB": 2 * 10**9, "500mb": 500 * 10**6, "1.5 KiB": 1536, "7": 7}[size]
    for wrong in ("", "GB", "0", "-1", "2 parsecs", "0.1"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)


def test_help_as_a_command():
    commands = [[sys.executable, script, "-h"] for script in (TO_HF, TO_DCP)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0
        assert "example:" in said
        assert "--output_path" in said


MEASURED = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
code = runpy.run_path(script)["main"]()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(status["VmHWM"].split()[0]) * 1024)  # ru_maxrss would count the process that started this one too
sys.exit(code)
"""


def peak_bytes(script, **flags):
    """The most memory that a conversion in a process of its own had."""
    given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    done = subprocess.run([sys.executable, "-c", MEASURED, script, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[1])


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_model_is_never_whole_in_memory(make_model, base_of, checkpoint_of, tmp_path):
    """Compared with the conversion of a tiny model: a few tensors more, of 8 MB at most."""
    config = LlamaConfig(**{**SIZES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16})
    config.save_pretrained(tmp_path / "large")
    shapes = weight_shapes(build_on_meta(config, "fp32"))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    assert size > 350e6
    large = Checkpointer(tmp_path).save(1, {"model": weights}, info={"model_path": str(tmp_path / "large")}).path
    small = checkpoint_of(make_model(), model_path=str(base_of(make_model())))

    def peak_of_export(path, name):
        return peak_bytes(TO_HF, dcp_path=path, output_path=tmp_path / name, max_shard_size="50MB")

    def peak_of_import(name):
        return peak_bytes(TO_DCP, hf_path=tmp_path / name, output_path=tmp_path / f"{name} weights")

    grown = peak_of_export(large, "large hf") - peak_of_export(small, "small hf")
    assert grown < size / 4
    assert len(list((tmp_path / "large hf").glob("*.safetensors"))) >= size // 50e6
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored(tmp_path / "large hf").items())
    grown = peak_of_import("large hf") - peak_of_import("small hf")
    assert grown < size / 4
