"""Checkpoints to Hugging Face directories: bitwise identical models, and what is refused."""

import json
import os
import stat

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.models.hf_directory import resolve
from rlinf_lite.weights.names import named_weights

EMBEDDED = "embedded:tiny-arithmetic"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
def test_every_architecture_there_and_back(
    family, tied, make_model, base_of, checkpoint_of, to_hf, to_dcp, assert_same_model, stored, tmp_path
):
    model = make_model(family, tied)
    out = tmp_path / "out"
    code, printed = to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))
    assert code == 0, printed
    assert str(out) in printed
    assert_same_model(out, model)
    assert ("lm_head.weight" in stored(out)) != tied

    code, printed = to_dcp(hf_path=out, output_path=tmp_path / "weights")
    assert code == 0, printed
    actor = tmp_path / "weights" / "global_step_0" / "actor"
    held = read_tensors(actor, lambda name: name.startswith("model."))
    assert held.keys() == {f"model.{name}" for name, _ in named_weights(model)}
    assert all(torch.equal(held[f"model.{name}"], tensor) for name, tensor in named_weights(model))

    code, printed = to_hf(dcp_path=actor.parent, output_path=tmp_path / "again")  # it knows the directory it came from
    assert code == 0, printed
    assert_same_model(tmp_path / "again", model)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_embedded_model_named_by_the_checkpoint(checkpoint_of, to_hf, assert_same_model, tmp_path):
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


def test_the_files_beside_the_weights(make_model, base_of, checkpoint_of, to_hf, assert_same_model, tmp_path):
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
def test_another_type(flag, dtype, make_model, base_of, checkpoint_of, to_hf, assert_same_model, stored, tmp_path):
    model, out = make_model("gemma"), tmp_path / "out"
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model), dtype=flag)[0] == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in stored(out).values()} == {dtype}
    assert_same_model(out, model, dtype)


def test_the_type_is_kept_unless_told_otherwise(make_model, base_of, checkpoint_of, to_hf, assert_same_model, tmp_path):
    model, out = make_model().bfloat16(), tmp_path / "out"
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))[0] == 0
    assert_same_model(out, model, torch.bfloat16)


def test_a_value_too_large_for_the_type(make_model, base_of, checkpoint_of, to_hf, assert_refused, tmp_path):
    model, out = make_model(), tmp_path / "out"
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    answer = to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model), dtype="fp16")
    assert_refused(answer, "model.norm.weight", "too large", "--dtype")
    assert not list(tmp_path.glob("out*"))


def test_several_files(make_model, base_of, checkpoint_of, to_hf, to_dcp, assert_same_model, tmp_path):
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


def test_a_tensor_larger_than_a_file_has_one_for_itself(
    make_model, base_of, checkpoint_of, to_hf, assert_same_model, tmp_path
):
    model, out = make_model(), tmp_path / "out"
    flags = {"dcp_path": checkpoint_of(model), "base_model": base_of(model)}
    assert to_hf(output_path=out, max_shard_size=1, **flags)[0] == 0
    assert len(list(out.glob("*.safetensors"))) == len(list(named_weights(model)))
    assert_same_model(out, model)


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
def test_directories_of_other_projects(form, tied, make_model, base_of, to_hf, assert_same_model, tmp_path):
    """As `get_model_state_dict` returns a model, alone or below a key; tied weights are there under both names."""
    model, out = make_model(tied=tied), tmp_path / "out"
    state = get_model_state_dict(model)
    everything = {
        "bare": state,
        "section": {"model": state, "optim": {"lr": 0.1, "w": torch.ones(2)}, "epoch": 3},
        "rlinf": {"fsdp_checkpoint": {"model": state, "rng": {"python": (3, (1, 2), None)}}},
    }[form]
    dcp.save(everything, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, printed = to_hf(dcp_path=tmp_path / "dcp", output_path=out, base_model=base_of(model))
    assert code == 0, printed
    assert_same_model(out, model)


def test_an_empty_directory_is_filled(make_model, base_of, checkpoint_of, to_hf, assert_same_model, tmp_path):
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    assert to_hf(dcp_path=checkpoint_of(model), output_path=out, base_model=base_of(model))[0] == 0
    assert_same_model(out, model)


def test_an_existing_output_is_refused(make_model, checkpoint_of, to_hf, assert_refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    path = checkpoint_of(make_model(), model_path=EMBEDDED)
    assert_refused(to_hf(dcp_path=path, output_path=tmp_path / "out"), str(tmp_path / "out"), "not empty")
    assert_refused(to_hf(dcp_path=path, output_path=tmp_path / "file"), str(tmp_path / "file"), "there already")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_base_model_is_needed(make_model, checkpoint_of, to_hf, assert_refused, tmp_path):
    model, out = make_model(), tmp_path / "out"
    assert_refused(to_hf(dcp_path=checkpoint_of(model, 1), output_path=out), "--base_model is needed")
    gone = checkpoint_of(model, 2, model_path=str(tmp_path / "gone"))
    assert_refused(to_hf(dcp_path=gone, output_path=out), "manifest", str(tmp_path / "gone"), "--base_model")
    answer = to_hf(dcp_path=gone, output_path=out, base_model=tmp_path / "nowhere")
    assert_refused(answer, "--base_model=", "nowhere", "no config.json")


def test_another_tokenizer_than_the_run_had_is_noted(make_model, base_of, checkpoint_of, to_hf, tmp_path):
    model = make_model()
    path = checkpoint_of(model, identity={"actor.tokenizer (files)": "0" * 64})
    code, printed = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base_of(model))
    assert code == 0
    assert "note: the tokenizer files are those of" in printed


def damage(path):
    shard = path / "actor" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def test_a_damaged_checkpoint_is_refused(make_model, base_of, checkpoint_of, to_hf, assert_refused, tmp_path):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    shard = damage(path)
    flags = {"dcp_path": path, "output_path": tmp_path / "out", "base_model": base}
    assert_refused(to_hf(**flags), str(shard), "blake3")
    assert not list(tmp_path.glob("out*"))
    with shard.open("ab") as stream:
        stream.write(b"more")
    assert_refused(to_hf(**flags, verify="size"), str(shard), "bytes, the manifest says")
    (path / "manifest.json").unlink()
    assert_refused(to_hf(**flags, verify="off"), "never committed")


def test_verification_can_be_skipped(
    make_model, base_of, checkpoint_of, to_hf, assert_refused, assert_same_model, tmp_path
):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    (path / "data" / "more").write_text("not in the manifest")
    flags = {"dcp_path": path, "output_path": tmp_path / "out", "base_model": base}
    assert_refused(to_hf(**flags, verify="size"), "data/more is not in the manifest")
    assert to_hf(**flags, verify="off")[0] == 0
    assert_same_model(tmp_path / "out", model)


def test_another_model_is_refused_by_name(make_model, base_of, checkpoint_of, to_hf, assert_refused, tmp_path):
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


def test_a_base_that_ties_weights_that_the_checkpoint_does_not(
    make_model, base_of, checkpoint_of, to_hf, assert_refused, tmp_path
):
    path, base = checkpoint_of(make_model(tied=False)), base_of(make_model(tied=True))
    answer = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base)
    assert_refused(answer, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings: false")


def test_a_full_disk_leaves_nothing(make_model, base_of, checkpoint_of, to_hf, largest_file, assert_refused, tmp_path):
    model = make_model()
    base, path = base_of(model), checkpoint_of(model)
    with largest_file(4096):
        answer = to_hf(dcp_path=path, output_path=tmp_path / "out", base_model=base)
    assert_refused(answer, "File too large", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
