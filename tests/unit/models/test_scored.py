"""Log-probs and values of whole models, compared with the logits of the models' own forward methods."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from rlinf_lite.errors import ConfigError
from rlinf_lite.models import attention
from rlinf_lite.models.build import build_on_meta, build_value_model_on_meta, disable_dropout
from rlinf_lite.models.head import LogitTransform
from rlinf_lite.models.logits import logit_transform
from rlinf_lite.models.scored import ScoredModel, ValueModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.ties import tied_names
from rlinf_lite.types import Segments

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 8}
FAMILIES = {
    "gpt2": ({"vocab_size": 64, "initializer_range": 0.2, **SMALL}, LogitTransform()),
    "gpt_neox": ({}, LogitTransform()),
    "qwen2": ({}, LogitTransform()),
    "qwen3": ({}, LogitTransform()),
    "qwen3_moe": (MOE, LogitTransform()),
    "llama": ({}, LogitTransform()),
    "mistral": ({}, LogitTransform()),
    "mixtral": ({"num_local_experts": 4}, LogitTransform()),
    "phi3": ({}, LogitTransform()),
    "olmo2": ({}, LogitTransform()),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, LogitTransform()),
    "gemma": ({}, LogitTransform()),
    "gemma2": ({**GEMMA, "final_logit_softcapping": 3.0}, LogitTransform(softcap=3.0)),
    "gemma3_text": ({**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}, LogitTransform()),
    "cohere": ({"logit_scale": 0.3}, LogitTransform(scale=0.3)),
    "granite": ({"logits_scaling": 6.0}, LogitTransform(scale=1 / 6.0)),
    "minicpm3": ({"dim_model_base": 16, "num_key_value_heads": 4}, LogitTransform(scale=0.5)),
    "falcon_h1": ({**MAMBA, "lm_head_multiplier": 0.4}, LogitTransform(scale=0.4)),
}
TRAINED = [family for family in FAMILIES if family != "falcon_h1"]
EXACT = [family for family in FAMILIES if FAMILIES[family][1].scale == 1.0]
IDS = torch.tensor([[1, 5, 9, 3, 14, 17, 8, 4, 11, 12, 13, 6], [1, 3, 3, 17, 10, 15, 6, 7, 8, 9, 0, 0]])
ROWS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
COLUMNS = torch.tensor([3, 4, 4, 9, 1, 2, 3, 8, 8])  # some places twice, as if they predicted tokens of two responses
SOURCE = ROWS * 12 + COLUMNS
TARGETS = torch.tensor([14, 17, 63, 12, 3, 17, 10, 9, 40])


def two_rows():
    """``IDS`` as arguments of a model: two sequences end to end."""
    segments = Segments(start_S=torch.tensor([0, 12]), stop_S=torch.tensor([12, 24]), parent_S=torch.tensor([-1, -1]))
    tokens = FlatTokens.of(IDS.flatten(), torch.arange(12).repeat(2), segments)
    return tokens.ids_N, tokens.positions_N, tokens.layout


def config_of(family, **changes):
    settings, _ = FAMILIES[family]
    sizes = {} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **settings, **changes})
    disable_dropout(config)
    return config


def causal_lm(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=dtype)


def own_logits(model):
    """By the model's own forward method, with whichever attention it has."""
    ids_N, positions_N, layout = two_rows()
    if model.config._attn_implementation == attention.NAME:
        given = {"input_ids": ids_N[None], "position_ids": positions_N[None], "layout": layout}
        return model(**given, use_cache=False).logits[0, SOURCE]
    return model(input_ids=IDS, use_cache=False).logits[ROWS, COLUMNS]


def own_stats(model, temperature):
    logits = own_logits(model)
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs.gather(1, TARGETS[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def gradients(model, stats):
    weights = torch.linspace(-1, 2, len(ROWS))
    loss = (stats[0] * weights).sum() - 0.3 * (stats[1] * weights.flip(0)).sum()
    params = [param for param in model.parameters() if param.requires_grad]
    return torch.autograd.grad(loss, params, allow_unused=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_found_without_weights(family):
    model = build_on_meta(config_of(family), "bf16")
    found, expected = logit_transform(model), FAMILIES[family][1]
    assert found == expected
    assert all(param.is_meta for param in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TRAINED)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(family, tied):
    """Of its own logits with our attention: bit-exact where the product is not scaled. With transformers' attention:
    nearly, gradients too.
    """
    model = causal_lm(family, tie_word_embeddings=tied)
    assert bool(tied_names(model)) == tied
    theirs = own_stats(model, 0.7)
    expected = gradients(model, theirs)
    ours = ScoredModel(model)(*two_rows(), SOURCE, TARGETS, 0.7, True)
    for one, exact, near in zip(ours, own_stats(model, 0.7), theirs, strict=True):
        if family in EXACT:
            assert torch.equal(one, exact)
        torch.testing.assert_close(one, near, rtol=1e-5, atol=1e-5)
    found = gradients(model, ours)
    largest = max(grad.abs().max() for grad in expected if grad is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(largest))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_bf16_log_probs_are_those_of_the_models_own_logits(family):
    model = causal_lm(family, torch.bfloat16)
    found, _ = ScoredModel(model)(*two_rows(), SOURCE, TARGETS, 1.0, False)
    assert found.dtype == torch.float32 and torch.equal(found, own_stats(model, 1.0)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_loss_tokens_every_weight_gets_zeros(family):
    """So that a rank without a unit takes part in the same collectives as the others."""
    model = causal_lm(family)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = FlatTokens.none()
    logprob, entropy = ScoredModel(model)(nothing.ids_N, nothing.positions_N, nothing.layout, none, none, 1.0, False)
    assert logprob.shape == (0,) and entropy is None
    logprob.sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "electra", "modernbert-decoder", "llama4_text"])
def test_a_head_of_another_kind_is_refused(model_type):
    config = AutoConfig.for_model(model_type, **SIZES)
    with pytest.raises(ConfigError, match=f"^model_type={model_type}: a model of this type .*choose another"):
        ScoredModel(build_on_meta(config, "fp32"))


def test_a_scale_that_no_config_names_is_refused():
    class Odd(type(causal_lm("llama"))):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 1.01
            return found

    with pytest.raises(ConfigError, match=r"model_type=llama: .*in its own way"):
        ScoredModel(Odd(config_of("llama")))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "mistral"])
def test_values_are_those_of_a_token_classifier_without_dropout(family):
    torch.manual_seed(0)
    config = config_of(family, num_labels=1)
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    own = own_logits(model.eval())[:, 0]
    found = ValueModel(model.train())(*two_rows(), SOURCE)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and found.std() > 0
    weights = torch.linspace(-1, 2, len(ROWS))
    for one, other in zip(
        *(torch.autograd.grad((values * weights).sum(), list(model.parameters())) for values in (found, own)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_values_without_loss_tokens_give_zeros():
    model = AutoModelForTokenClassification.from_config(config_of("llama", num_labels=1), dtype=torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = FlatTokens.none()
    ValueModel(model)(nothing.ids_N, nothing.positions_N, nothing.layout, none).sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())


def test_a_value_model_is_built_without_memory_and_refused_where_there_is_none():
    config = config_of("llama")
    model = build_value_model_on_meta(config, "bf16")
    assert config.num_labels == 2 and all(param.is_meta for param in model.parameters())
    assert dict(model.named_parameters())["score.weight"].shape == (1, 32)
    with pytest.raises(
        ConfigError, match=r"critic\.model\.model_path: .* no token classifier for the model type cohere"
    ):
        build_value_model_on_meta(config_of("cohere"), "bf16")
    with pytest.raises(ConfigError, match=r"model_type=llama: .*choose another architecture for the critic"):
        ValueModel(AutoModelForTokenClassification.from_config(config_of("llama", num_labels=2)))
