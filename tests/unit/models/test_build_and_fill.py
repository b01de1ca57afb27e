"""Build on meta, materialize, fill: the same model as `from_pretrained`, and errors that name the cause."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import build, hf_directory, shard
from rlinf_lite.ties import tied_names
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.live import fill
from rlinf_lite.weights.names import WeightNames, named_weights

ARCHITECTURES = ["llama", "gpt2", "qwen2", "qwen3", "gemma2"]
IDS = torch.tensor([[1, 5, 9, 33, 60, 2, 7, 8, 4, 11, 12, 13], [3, 3, 3, 17, 29, 40, 41, 42, 43, 44, 45, 46]])
CPU = torch.device("cpu")


def source_of(model, path):
    return HfWeights(path, WeightNames.of(model))


def ours(path, precision="fp32"):
    model = build.build_on_meta(hf_directory.load_config(path, None), precision)
    build.materialize(model, CPU)
    fill(model, source_of(model, path))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_same_logits_as_from_pretrained(tiny_directory, model_type):
    path = tiny_directory(model_type)
    model = build.build_on_meta(hf_directory.load_config(path, model_type), "fp32")
    assert all(param.is_meta for param in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    tied = tied_names(model)
    build.materialize(model, CPU)
    fill(model, source_of(model, path))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert tied_names(model) == tied
    assert bool(tied) == model.config.tie_word_embeddings
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert torch.equal(logits(model.eval()), logits(reference))
    assert len(shard.blocks(model)) == 2


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_bf16_is_the_same_as_from_pretrained(tiny_directory, model_type):
    path = tiny_directory(model_type)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model = ours(path, "bf16")
    assert {name: b.dtype for name, b in model.named_buffers()} == {n: b.dtype for n, b in reference.named_buffers()}
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(reference))


def test_a_tie_is_one_tensor(tiny_directory):
    model = ours(tiny_directory("llama"))
    assert tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(named_weights(model))


def test_weights_saved_from_the_bare_base_model(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(ours(tmp_path)), logits(model))


def test_a_tie_stored_under_its_other_name(tiny_directory):
    path = tiny_directory("llama")
    stored = load_file(path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(ours(path)), logits(AutoModelForCausalLM.from_pretrained(path).eval()))


def test_weights_in_several_files(tiny_directory):
    whole, split = tiny_directory("qwen2", name="whole"), tiny_directory("qwen2", name="split", max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    assert (split / "model.safetensors.index.json").exists()
    assert torch.equal(logits(ours(split)), logits(ours(whole)))


def test_other_stored_precision_is_converted(tiny_model, tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(ours(tmp_path)), logits(reference))


def test_persistent_buffers_are_filled_and_computed_ones_left_alone(tmp_path):
    class Model(torch.nn.Module):
        base_model_prefix = "base"

        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 2), value))
            self.gain = torch.nn.Parameter(torch.tensor(value))
            self.register_buffer("kept", torch.full((2,), value))
            self.register_buffer("computed", torch.full((2,), value), persistent=False)

    save_file({name: tensor.detach() for name, tensor in Model(3.0).state_dict().items()}, tmp_path / "m.safetensors")
    model = Model(1.0)
    fill(model, source_of(model, tmp_path))
    assert [name for name, _ in named_weights(model)] == ["weight", "gain", "kept"]
    assert {n: t.unique().item() for n, t in [*model.named_parameters(), *model.named_buffers()]} == {
        "weight": 3.0,
        "gain": 3.0,
        "kept": 3.0,
        "computed": 1.0,
    }


def test_a_missing_weight_is_named(tiny_directory):
    path = tiny_directory("qwen2")
    stored = load_file(path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(path))}: its weights lack model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        ours(path)


def test_another_shape_is_named(tiny_directory):
    path = tiny_directory("qwen2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 62}))
    with pytest.raises(
        ConfigError, match=r"qwen2: model\.embed_tokens\.weight is \[61, 32\], .*config\.json wants \[62, 32\]"
    ):
        ours(path)


def test_no_weights(tiny_directory):
    path = tiny_directory("qwen2")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors there"):
        ours(path)


def test_a_file_of_the_index_is_missing(tiny_directory):
    path = tiny_directory("qwen2", max_shard_size="20KB")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=rf"{re.escape(gone.name)}.*copy the directory again"):
        ours(path)


def test_a_truncated_file(tiny_directory):
    path = tiny_directory("qwen2")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors.*copy the directory again"):
        ours(path)


RSS_OF_A_LARGE_MODEL = """
import ctypes, psutil, torch
from transformers import AutoConfig
from rlinf_lite.models import build, shard
config = AutoConfig.for_model(
    "qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    layer_types=["full_attention"] * 28,
)
build.build_on_meta(AutoConfig.for_model("qwen2", num_hidden_layers=1, hidden_size=64, num_attention_heads=4), "fp32")
def used():
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and kept for later, is not counted
    return psutil.Process().memory_info().rss
before = used()
model = build.build_on_meta(config, "bf16")
grown = used() - before
print(sum(p.numel() for p in model.parameters()), len(shard.blocks(model)), grown >> 20)
"""


def test_a_large_model_takes_no_memory_on_meta(run_forked):
    num_parameters, num_blocks, grown_mib = map(int, run_forked("-c", RSS_OF_A_LARGE_MODEL).stdout.split())
    assert num_parameters == 1_543_714_304
    assert num_blocks == 28
    assert grown_mib < 100


def test_precision_decides_the_parameters_type():
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=8)
    for precision, dtype in build.DTYPES.items():
        model = build.build_on_meta(config, precision)
        assert {param.dtype for param in model.parameters()} == {dtype}
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_the_patch_of_torch_is_undone_after_an_error():
    register, normal = torch.nn.Module.register_parameter, torch.nn.init.normal_
    message = r"actor\.model\.model_path: transformers has no causal LM for the model type vit: .*ViTConfig"
    with pytest.raises(ConfigError, match=message):
        build.build_on_meta(AutoConfig.for_model("vit"), "fp32")
    assert torch.nn.Module.register_parameter is register and torch.nn.init.normal_ is normal
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_an_invalid_index(tiny_directory, content):
    path = tiny_directory("qwen2", max_shard_size="20KB")
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json cannot be used"):
        ours(path)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_read_returns_what_fill_copies(tiny_model, tiny_directory, model_type):
    path = tiny_directory(model_type)
    model = build.build_on_meta(hf_directory.load_config(path, None), "fp32")
    source = source_of(model, path)
    found, filled = {name: source.read(name) for name in source.shapes}, dict(named_weights(ours(path)))
    assert list(found) == list(filled)
    assert all(torch.equal(found[name], filled[name]) for name in found)


@pytest.mark.parametrize("kind", ["gpt2", "biogpt", "xglm", "opt"])
def test_dropout_is_disabled_whatever_its_name(kind):
    config = AutoConfig.for_model(kind)
    asked = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value > 0]
    assert asked
    build.disable_dropout(config)
    assert [getattr(config, name) for name in asked] == [0.0] * len(asked)
