"""Where old log-probs come from: the engine, only where it saves a pass and its log-probs are the policy's bits."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoConfig

from rlinf_lite import numerics
from rlinf_lite.config import Config
from rlinf_lite.config.compose import load
from rlinf_lite.recovery.logprobs import engine_is_exact, old_from_engine

TWO = "algorithm.n_minibatches=2"
KL = ("algorithm.adv_type=reinpp", "algorithm.kl_in_reward=true", "algorithm.kl_beta=0.1")
BF16 = ("actor.fsdp_config.mixed_precision.param_dtype=bf16", "rollout.model.precision=bf16")
REPORTED = "rollout.return_logprobs=true"


@functools.cache
def composed(*overrides: str) -> Config:
    return load(list(overrides))


def asked(*overrides: str, device: str = "cpu") -> tuple[bool, bool]:
    return answers(composed(*overrides), device)


def answers(config: Config, device: str = "cpu") -> tuple[bool, bool]:
    return engine_is_exact(config, device), old_from_engine(config, device)


@pytest.mark.parametrize("pass_of", [[TWO], [*KL, "algorithm.kl_penalty_type=kl"]], ids=["mini-batches", "KL"])
def test_a_pass_that_would_change_no_bit_is_saved(pass_of):
    assert asked(*pass_of) == (True, True)
    assert asked() == (True, False), "no pass, so none is saved, and the engine reports nothing"


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.threads_per_worker=2"],
        ["cluster.deterministic=false"],
        ["rollout.rollout_backend=vllm"],
        ["rollout.model.model_path=/elsewhere"],
        ["rollout.model.precision=bf16"],
        ["actor.fsdp_config.mixed_precision.param_dtype=bf16", "rollout.model.precision=fp32"],
        [*BF16],
        ["actor.model.dropout=true"],
        ["actor.fsdp_config.strategy=fsdp"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_where_the_bits_may_differ_they_are_recomputed(overrides):
    assert asked(TWO, *overrides) == (False, False)
    reported = composed(TWO, *overrides).model_copy(deep=True)
    reported.algorithm.recompute_logprobs, reported.rollout.return_logprobs = False, True
    assert answers(reported) == (False, True)


def test_those_of_the_engine_may_be_asked_for():
    asks = "algorithm.recompute_logprobs=false", REPORTED
    assert asked(TWO, "cluster.threads_per_worker=2", *asks) == (False, True)
    assert asked(TWO, *asks) == (True, True)


@pytest.mark.parametrize(
    ("model_type", "sizes", "exact"),
    [
        ("llama", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}, (True, True)),
        ("llama", {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4}, (True, False)),
        ("llama", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}, (False, False)),
        (
            "llama",
            {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 16},
            (False, False),
        ),
        ("qwen3_moe", {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}, (True, True)),
        (
            "ernie4_5_moe",
            {"hidden_size": 64, "num_attention_heads": 4, "moe_num_experts": 4},
            (False, True),
        ),
        (
            "qwen3",
            {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 12},
            (False, False),
        ),
        ("gpt2", {"n_embd": 64, "n_head": 4}, (True, True)),
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_inner": 100}, (True, False)),
    ],
)
def test_only_ordinary_sizes(tmp_path, monkeypatch, model_type, sizes, exact):
    """On a CPU of heads, on a GPU of layers, too."""
    monkeypatch.setattr(numerics, "rows_are_independent", lambda longest_sum: True)
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    model, (on_cpu, on_gpu) = f"actor.model.model_path={tmp_path}", exact
    assert asked(TWO, model) == (on_cpu, on_cpu)
    assert asked(TWO, *BF16, model, device="cuda") == (on_gpu, on_gpu)


@pytest.mark.parametrize(
    ("model_type", "sizes", "longest"),
    [
        ("llama", {"hidden_size": 512, "num_attention_heads": 8}, 64),
        ("llama", {"hidden_size": 512, "num_attention_heads": 4}, 128),
        ("gemma2", {"head_dim": 256}, 256),
        ("minicpm3", {"hidden_size": 64, "num_attention_heads": 4}, 96),
        ("qwen3_moe", {"hidden_size": 64, "head_dim": 16, "intermediate_size": 80, "moe_intermediate_size": 32}, 80),
        ("mixtral", {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 208}, 208),
    ],
)
def test_only_sums_whose_order_mkl_keeps(tmp_path, monkeypatch, model_type, sizes, longest):
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    model = f"actor.model.model_path={tmp_path}"
    for limit, exact in ((longest, True), (longest - 1, False)):
        monkeypatch.setattr(numerics, "rows_are_independent", lambda longest_sum, limit=limit: longest_sum <= limit)
        assert asked(TWO, model) == (exact, exact)


def test_on_a_gpu_16_bits_with_flash_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "rows_are_independent", lambda longest_sum: True)
    assert asked(TWO, *BF16, device="cuda") == (True, True)
    assert asked(TWO, device="cuda") == (False, False)
    AutoConfig.for_model("gemma2", num_hidden_layers=2).save_pretrained(tmp_path)
    capped = f"actor.model.model_path={tmp_path}"
    assert asked(TWO, *BF16, capped, device="cuda") == (False, False) and asked(TWO, capped)[0]


@pytest.mark.parametrize(
    "asks_for_the_pass",
    [["algorithm.importance_sampling_fix=true", REPORTED], ["algorithm.path=my_algo.py:MyAlgorithm"]],
    ids=["correction", "own algorithm"],
)
def test_a_pass_that_was_asked_for_is_not_saved(asks_for_the_pass):
    assert asked(TWO, *asks_for_the_pass) == (True, False)
