"""Layers of Llama's form in fewer calls: bitwise identical to the model's own forward pass, or not used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite.models import products
from rlinf_lite.rollout import packed_layers
from rlinf_lite.rollout.forward import Forward
from rlinf_lite.rollout.packed_layers import PackedLayers
from tests.unit.rollout.conftest import COMMON, CONFIGS

needs_onednn = pytest.mark.skipif(not products.is_available(), reason="oneDNN has no kernels for this processor")
SIZES = {**COMMON, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 300}
LLAMAS = {
    "llama": SIZES,
    "llama-bias": {**SIZES, "attention_bias": True, "mlp_bias": True},
    "llama-odd-width": {**SIZES, "intermediate_size": 100},
    "llama-long-rope": {
        **SIZES,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "mistral-window": {**SIZES, "sliding_window": 6},
    "qwen2": SIZES,
    "qwen2-window": {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES,
}
OTHERS = {
    "llama-gelu": {**SIZES, "hidden_act": "gelu"},
    "smollm3": SIZES,
    "helium": SIZES,
    "granite": SIZES,
    "ministral3": SIZES,
}
PROMPTS = [[3, 5, 7], [11, 2, 9, 4, 8, 8, 1, 30, 31, 32], [6], [3, 5, 7, 9, 21]]


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    config = AutoConfig.for_model(name.split("-")[0], **{**CONFIGS, **LLAMAS, **OTHERS}[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # biases and norms, too
        nn.init.normal_(parameter.data, std=0.3)
    return model


def responses(engine, batch) -> list[tuple]:
    groups = engine.generate(batch)
    return [
        (response.token_ids.tolist(), response.logprobs.tobytes()) for group in groups for response in group.responses
    ]


@needs_onednn
@pytest.mark.parametrize("large", [1 << 8, 1 << 30], ids=["copied weights", "own weights"])
@pytest.mark.parametrize("name", LLAMAS)
def test_responses_are_those_of_the_models_own_layers(make_engine, make_batch, monkeypatch, name, large):
    monkeypatch.setattr(packed_layers, "_LARGE", large)
    joined = []
    true = PackedLayers.joint
    monkeypatch.setattr(PackedLayers, "joint", lambda *args: joined.append(true(*args)) or joined[-1])
    model, found = make(name), []
    for own in (False, True):
        engine = make_engine(model, eos_ids=range(4), return_logprobs=True, max_rows=5)
        if own:
            engine._decoder._forward.layers = None
        found.append(responses(engine, make_batch(PROMPTS, group_size=3, max_new_tokens=40)))
        assert (engine._decoder._forward.layers is None) == own
    assert found[0] == found[1]
    assert any(each is not None for each in joined) == (large == 1 << 8)


@needs_onednn
@pytest.mark.parametrize("name", ["gpt2", "gemma2", *OTHERS])
def test_other_architectures_keep_their_own(name):
    """Even with weights that hide the difference, as a training from scratch may have at first."""
    model = make(name)
    for layer in getattr(model.base_model, "layers", []):
        nn.init.zeros_(layer.self_attn.o_proj.weight.data)
        nn.init.zeros_(layer.mlp.down_proj.weight.data)
    with torch.inference_mode():
        assert Forward(model).layers is None


@needs_onednn
def test_a_model_of_the_same_type_from_elsewhere_keeps_its_own():
    model = make("llama")
    model.__class__ = type("Other", (type(model),), {"__module__": __name__})
    with torch.inference_mode():
        assert Forward(model).layers is None


@needs_onednn
@pytest.mark.parametrize("part", ["mlp.act_fn", "input_layernorm", "self_attn"])
def test_a_layer_that_computes_something_else_is_noticed(part):
    """The last one alone, in a single number."""
    model = make("llama")
    module = model.model.layers[-1].get_submodule(part)
    theirs = module.forward

    def forward(*args, **kwargs):
        found = theirs(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first.view(-1)[-1] += 0.01
        return found

    module.forward = forward
    with torch.inference_mode():
        assert Forward(model).layers is None


@needs_onednn
def test_queries_that_are_scaled_at_the_end_of_the_context_only_are_noticed():
    """As in Ministral: the first tokens would not show it."""
    model = make("llama")
    theirs = model.model.layers[0].self_attn.forward

    def forward(hidden_states, position_ids, **kwargs):
        scale = 1.0 + 0.1 * (position_ids[..., None] >= 60)
        return theirs(hidden_states * scale, position_ids=position_ids, **kwargs)

    model.model.layers[0].self_attn.forward = forward
    assert model.config.max_position_embeddings == 64
    with torch.inference_mode():
        assert Forward(model).layers is None


@needs_onednn
@pytest.mark.parametrize("sizes", [(64, 32, 32), (576, 192, 192), (1536, 1536), (100, 60), (7, 5, 300)])
@pytest.mark.parametrize("inputs", [32, 60, 576])
def test_a_joint_product_is_several(monkeypatch, sizes, inputs):
    monkeypatch.setattr(packed_layers, "_LARGE", 1)
    torch.manual_seed(len(sizes) * inputs)
    model = make("llama")
    layers = tuple(nn.Linear(inputs, size).requires_grad_(False) for size in sizes)
    packed = PackedLayers(model)
    assert packed.joint(layers, 8) is None, "no batch is decoded"
    with packed:
        joint = packed.joint(layers, 8)
        assert joint is not None and packed.joint(layers, 8)[0] is joint[0]
        assert packed.joint(layers, 129) is None
        for num in range(2, 129):
            x = torch.randn(num, inputs)
            apart = [products.product(x, layer.weight, layer.bias) for layer in layers]
            assert torch.equal(products.product(x, *joint), torch.cat(apart, -1)), num


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


@needs_onednn
@pytest.mark.parametrize("other", [nn.Linear(32, 64, bias=False), Scaled(32, 64)], ids=["no bias", "another class"])
def test_layers_of_two_kinds_are_not_joined(monkeypatch, other):
    monkeypatch.setattr(packed_layers, "_LARGE", 1)
    like = nn.Linear(32, 64).requires_grad_(False)
    with (packed := PackedLayers(make("llama"))):
        assert packed.joint((like, like), 8) is not None
        assert packed.joint((nn.Linear(32, 64).requires_grad_(False), other.requires_grad_(False)), 8) is None


@needs_onednn
def test_a_joint_product_of_other_bits_is_not_used(monkeypatch):
    monkeypatch.setattr(packed_layers, "_LARGE", 1)
    layers = tuple(nn.Linear(32, 64).requires_grad_(False) for _ in range(2))
    true = products.product

    def other(x, weight, bias):
        found = true(x, weight, bias)
        return found.nextafter(torch.tensor(9.0)) if weight.shape[0] == 128 and len(x) == 32 else found

    monkeypatch.setattr(products, "product", other)
    with (packed := PackedLayers(make("llama"))):
        assert packed.joint(layers, 8) is None


@needs_onednn
def test_joint_weights_stay_below_the_limit(monkeypatch):
    monkeypatch.setattr(packed_layers, "_LARGE", 1)
    monkeypatch.setattr(packed_layers, "MAX_BYTES", 4 * 32 * 128)
    first, second = ((nn.Linear(32, 64).requires_grad_(False),) * 2 for _ in range(2))
    with (packed := PackedLayers(make("llama"))):
        assert packed.joint(first, 8) is not None
        assert packed.joint(second, 8) is None
