"""The builtin engine's log-probs are the trainer's, bit for bit, and what is generated together changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlinf_lite import numerics
from rlinf_lite.models.scored import ScoredModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"sliding_window": 9, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 5.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 41, "initializer_range": 0.3}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "v_head_dim": 64}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 6, "num_experts_per_tok": 2}
GATED = {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": GPT2,
    "gemma2": {**SIZES, **GEMMA},
}
ENDS = {4, 6}
rng = np.random.default_rng(3)
PROMPTS = [rng.integers(3, 41, n).tolist() for n in (3, 40, 1, 9, 33)]


@pytest.fixture(scope="module")
def model_of():
    def make(family: str, dtype: torch.dtype = torch.float32):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=dtype).eval()

    return make


def trainer_logprobs(model, groups, rows_per_unit: int, temperature: float) -> np.ndarray:
    """As the trainer computes them, in units of so many responses."""
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=rows_per_unit, rows_for_update=1, max_tokens=None
    )
    num = sum(len(group.responses) for group in groups)
    root, found = ScoredModel(copy.deepcopy(model)), []
    for unit in StepBatch(StepRows(groups, step=1, settings=settings), [True] * num).for_forward():
        tokens = FlatTokens.of(unit.ids_N, unit.positions_N, unit.segments)
        given = tokens.ids_N, tokens.positions_N, tokens.layout, unit.source_M, unit.targets_M
        with torch.no_grad():
            found.append(root(*given, temperature, False)[0])
    return torch.cat(found).numpy()


def engine_logprobs(groups) -> np.ndarray:
    return np.concatenate([response.logprobs for group in groups for response in group.responses])


def sampled(groups) -> list[list[int]]:
    return [response.token_ids.tolist() for group in groups for response in group.responses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_trainers(model_of, make_engine, make_batch, family, dtype):
    """Rows leave and join at any time; the trainer computes responses alone, in threes, in 64s."""
    model = model_of(family, dtype)
    engine = make_engine(model, eos_ids=ENDS, return_logprobs=True, max_rows=7)
    groups = engine.generate(make_batch(PROMPTS, group_size=3, max_new_tokens=40, temperature=0.7))
    found = engine_logprobs(groups)
    assert len({len(response) for response in sampled(groups)}) > 5 and found.std() > 0.1
    for rows_per_unit in (1, 3, 64):
        assert np.array_equal(found, trainer_logprobs(model, groups, rows_per_unit, 0.7))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 28, "intermediate_size": 33, "head_dim": 24, "vocab_size": 57}),
        ("qwen3", {"hidden_size": 100, "intermediate_size": 50, "head_dim": 8, "vocab_size": 130}),
        ("gemma2", {"hidden_size": 20, "intermediate_size": 28}),
        ("gpt2", {"n_embd": 40, "n_head": 1, "n_inner": 33}),
        ("qwen3_moe", {"hidden_size": 36, "moe_intermediate_size": 20, "num_experts": 6}),
        ("qwen2_moe", {**GATED, "shared_expert_intermediate_size": 28}),
        ("glm4_moe", {**GATED, "n_routed_experts": 6, "n_group": 1, "topk_group": 1}),
        ("minimax_m2", {"num_local_experts": 6, "num_experts_per_tok": 2}),
        ("llama", {"intermediate_size": 1100, "vocab_size": 1100}),  # weights of oneDNN's layout
    ],
)
def test_sizes_that_vectors_do_not_divide(make_engine, make_batch, family, sizes):
    """Where a tensor ends with a part of a vector, torch computes it with functions that round differently."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, SIZES), **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    engine = make_engine(model, eos_ids=ENDS, return_logprobs=True, max_rows=7)
    groups = engine.generate(make_batch(PROMPTS, group_size=3, max_new_tokens=40, temperature=0.7))
    for rows_per_unit in (1, 3, 64):
        assert np.array_equal(engine_logprobs(groups), trainer_logprobs(model, groups, rows_per_unit, 0.7))


@pytest.mark.xfail(not numerics.rows_are_independent(256), reason="never run on this processor", strict=False)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"head_dim": 96}),
        ("qwen3", {"head_dim": 128, "num_key_value_heads": 1}),
        ("gemma2", {"head_dim": 256, "num_key_value_heads": 4}),
        ("minicpm3", {**LATENT, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}),
        ("qwen3_moe", {**WIDE, "head_dim": 128}),
        ("mixtral", {"hidden_size": 128, "intermediate_size": 208, "num_local_experts": 4}),
    ],
)
def test_long_sums(make_engine, make_batch, family, sizes):
    """In attention, experts and their gates, for which MKL by itself takes other kernels if there are few rows."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, SIZES), **sizes})
    assert_exact(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), make_engine, make_batch)


USUAL = {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 512, "num_attention_heads": 8}
EXPERTS = {"hidden_size": 512, "moe_intermediate_size": 192, "num_experts_per_tok": 4, "head_dim": 128}


@pytest.mark.soak
@pytest.mark.xfail(not numerics.rows_are_independent(2304), reason="never run on this processor", strict=False)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}),
        ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}),
        ("qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_key_value_heads": 8, "head_dim": 128}),
        ("gemma2", {"hidden_size": 2304, "intermediate_size": 4608, "head_dim": 256, "sliding_window": 16}),
        ("phi3", {"hidden_size": 768, "intermediate_size": 2048, "num_key_value_heads": 8}),
        ("gpt2", {"n_embd": 640, "n_layer": 2, "n_head": 8}),
        ("deepseek_v3", {"hidden_size": 512, "intermediate_size": 1024, "num_key_value_heads": 8, "q_lora_rank": 192}),
        ("qwen3_moe", {**EXPERTS, "num_experts": 16}),
        ("glm4_moe", {**EXPERTS, "n_routed_experts": 16, "n_group": 1, "topk_group": 1}),
        ("mixtral", {"hidden_size": 512, "intermediate_size": 896, "num_key_value_heads": 2}),
        ("olmoe", {"hidden_size": 512, "intermediate_size": 256, "num_experts": 16}),
    ],
)
def test_usual_sizes(make_engine, make_batch, family, sizes):
    torch.manual_seed(5)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**USUAL, **ends, **sizes}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=0.1)
    assert_exact(model.eval(), make_engine, make_batch)


def assert_exact(model, make_engine, make_batch) -> None:
    """Against the trainer, in units of several sizes, and with few and many rows at once."""
    found = []
    for max_rows in (7, 512):
        engine = make_engine(model, eos_ids=ENDS, return_logprobs=True, max_rows=max_rows)
        groups = engine.generate(make_batch(PROMPTS, group_size=3, max_new_tokens=40, temperature=0.7))
        for rows_per_unit in (1, 3, 64):
            assert np.array_equal(engine_logprobs(groups), trainer_logprobs(model, groups, rows_per_unit, 0.7))
        found.append((sampled(groups), engine_logprobs(groups).tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2}])
def test_filters_and_greedy_decoding_leave_log_probs_alone(model_of, make_engine, make_batch, options):
    model = model_of("llama")
    engine = make_engine(model, eos_ids=ENDS, return_logprobs=True)
    groups = engine.generate(make_batch(PROMPTS, group_size=2, max_new_tokens=12, temperature=0.6, **options))
    temperature = 0.6 if options.get("do_sample", True) else 1.0
    assert np.array_equal(engine_logprobs(groups), trainer_logprobs(model, groups, 64, temperature))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_long_responses(model_of, make_engine, make_batch, family):
    model = model_of(family)
    engine = make_engine(model, eos_ids=set(), return_logprobs=True)
    groups = engine.generate(make_batch(PROMPTS[:2], group_size=2, max_new_tokens=300, temperature=1.3))
    assert {len(response) for response in sampled(groups)} == {300}
    assert np.array_equal(engine_logprobs(groups), trainer_logprobs(model, groups, 2, 1.3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_number_of_running_rows_changes_nothing(model_of, make_engine, make_batch, family):
    model = model_of(family)
    batch = make_batch(PROMPTS, group_size=2, max_new_tokens=33, repetition_penalty=1.1)
    made = [
        make_engine(model, eos_ids=ENDS, return_logprobs=True, max_rows=rows).generate(batch) for rows in (512, 7, 4, 1)
    ]
    assert len({len(response) for response in sampled(made[0])}) > 4, "rows leave at different times"
    for other in made[1:]:
        assert sampled(other) == sampled(made[0])
        assert np.array_equal(engine_logprobs(other), engine_logprobs(made[0]))


def test_a_prompt_gives_the_same_alone_and_among_others(model_of, make_engine, make_batch):
    engine = make_engine(model_of("llama"), eos_ids=ENDS, return_logprobs=True)
    together = engine.generate(make_batch(PROMPTS, group_size=3, max_new_tokens=20))
    for index, prompt in enumerate(PROMPTS):
        alone = engine.generate(make_batch([prompt], group_size=3, max_new_tokens=20, first=index))
        assert sampled(alone) == sampled(together[index : index + 1])
        assert np.array_equal(engine_logprobs(alone), engine_logprobs(together[index : index + 1]))


def test_a_failed_batch_leaves_nothing_behind(model_of, make_engine, make_batch):
    """Memory is kept between batches; what is not finite in it would spread."""
    model = model_of("llama")
    engine, batch = make_engine(model, return_logprobs=True), make_batch(PROMPTS, group_size=2, max_new_tokens=20)
    first = engine.generate(batch)
    value = model.model.layers[0].self_attn.v_proj.weight.detach()
    engine.load_weights([("model.layers.0.self_attn.v_proj.weight", 0, torch.full_like(value, torch.nan))])
    with pytest.raises(FloatingPointError, match="logits"):
        engine.generate(batch)
    engine.load_weights([("model.layers.0.self_attn.v_proj.weight", 0, value)])
    again = engine.generate(batch)
    assert sampled(again) == sampled(first) and np.array_equal(engine_logprobs(again), engine_logprobs(first))
